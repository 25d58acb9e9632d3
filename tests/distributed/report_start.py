"""A worker: writes down the weights that a run starts from and the batches that it is fed.

torchrun ... report_start.py OUT NUMBER_OF_BATCHES [options of the trainer]
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from titanlite.config import load_config
from titanlite.distributed.runtime import stop_runtime
from titanlite.train import Trainer


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    out, count = Path(sys.argv[1]), int(sys.argv[2])
    trainer = Trainer(load_config(sys.argv[3:]))
    batches = [next(trainer.loader) for _ in range(count)]
    report = {
        "weights": {name: digest(param) for name, param in trainer.model_parts[0].named_parameters()},
        "local_elements": sum(param.to_local().numel() for param in trainer.parameters()),
        "elements": sum(param.numel() for param in trainer.parameters()),
        "inputs": [batch.inputs.flatten(0, 1).tolist() for batch in batches],
        "labels": [batch.labels.flatten(0, 1).tolist() for batch in batches],
    }
    (out / f"{trainer.runtime.world_size}-{trainer.runtime.rank}.json").write_text(json.dumps(report))
    trainer.close()
    stop_runtime()


main()
