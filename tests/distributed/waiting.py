"""Workers of tests of long waits: a rank stops taking part in the third step."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.parallel import TINY_MODEL
from titanlite.config import load_config
from titanlite.distributed.waiting import timed_out
from titanlite.models.llama3.spec import FLAVORS
from titanlite.train import Trainer

LONGER = 60  # seconds; than any test


def train(options: dict[str, Any], absent: int, folder: Path) -> None:
    """Make two steps; rank ``absent`` makes no third one. Print the collective that this ends in another rank."""
    FLAVORS["tiny"] = TINY_MODEL
    trainer = Trainer(load_config([f"--{k}={v}" for k, v in {**options, "job.dump_folder": folder}.items()]))
    trainer.advance()
    trainer.advance()
    if dist.get_rank() == absent:
        time.sleep(LONGER)
    try:
        trainer.advance()
    except RuntimeError as e:
        print(f"titanlite: rank {dist.get_rank()} {timed_out(e)}", flush=True)
        raise SystemExit(3) from None
