"""What a process that ran out of memory leaves for others: how much it lacked, so that they can say what would have
saved it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from titanlite.environment import LAUNCH_DIR


@dataclass(frozen=True)
class Shortage:
    """What is known of a process that ran out of memory; sizes in bytes.

    Attributes:
        device: "cuda" or "cpu".
        room: what there was for tensors, taken or free; None where it is not known.
        requested: what could not be had; 0 where that is not known.
        unused: of a GPU's allocator: reserved, but in pieces too small.
        float8: whether the device has float8 units.
        config: the configuration, as TOML.
    """

    rank: int
    world_size: int
    device: str
    room: int | None
    requested: int
    unused: int
    float8: bool
    config: str


def advise(folder: Path, rank: int) -> None:
    """Print what would have saved the ``rank`` that has left a :class:`Shortage` in this folder, if it has."""
    file = shortage_file(folder, rank)
    if file.exists():
        # Without a GPU: estimates need none. Without a launcher: it is no worker.
        environment = {k: v for k, v in os.environ.items() if k != LAUNCH_DIR} | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-m", "titanlite.plan.advice", str(file)], env=environment, check=False)


def shortage_file(folder: Path, rank: int) -> Path:
    return folder / f"shortage-{rank}.json"
