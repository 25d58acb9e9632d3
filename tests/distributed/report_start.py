"""A worker: reports the weights that a run starts from and the batches that it is fed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from titanlite.config import load_config
from titanlite.distributed.runtime import stop_runtime
from titanlite.train import Trainer


def digest(tensor: torch.Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return hashlib.sha256(whole.detach().contiguous().numpy().tobytes()).hexdigest()


def report(count: int, options: dict[str, Any]) -> dict[str, Any]:
    trainer = Trainer(load_config([f"--{key}={value}" for key, value in options.items()]))
    batches = [next(trainer.loader) for _ in range(count)]
    results = {
        "weights": {name: digest(param) for name, param in trainer.model_parts[0].named_parameters()},
        "local_elements": sum(param.to_local().numel() for param in trainer.parameters()),
        "elements": sum(param.numel() for param in trainer.parameters()),
        "inputs": [batch.inputs.flatten(0, 1).tolist() for batch in batches],
        "labels": [batch.labels.flatten(0, 1).tolist() for batch in batches],
    }
    trainer.close()
    stop_runtime()
    return results
