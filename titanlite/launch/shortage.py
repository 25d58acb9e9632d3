"""The record that a process writes when it runs out of memory. Another process reads it to estimate which options
would have avoided that."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from titanlite.environment import LAUNCH_DIR


@dataclass(frozen=True)
class Shortage:
    """Facts about a process that ran out of memory; sizes in bytes.

    Attributes:
        device: "cuda" or "cpu".
        room: memory for tensors, used or free; None if it is not known.
        requested: the size of the allocation that failed; 0 if it is not known.
        unused: memory that a GPU's allocator has reserved, but in pieces that are too small.
        native_formats: the converters whose number format the device has units for.
        config: the configuration, as TOML.
        device_name: the name of a GPU, as torch reports it.
    """

    rank: int
    world_size: int
    device: str
    room: int | None
    requested: int
    unused: int
    native_formats: list[str]
    config: str
    device_name: str = ""


def advise(folder: Path, rank: int) -> None:
    """If ``rank`` has left a :class:`Shortage` in this folder, print which options would have saved enough memory."""
    file = shortage_file(folder, rank)
    if file.exists():
        # Estimates need no GPU, and their process is not a worker of the launcher.
        environment = {k: v for k, v in os.environ.items() if k != LAUNCH_DIR} | {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-m", "titanlite.plan.advice", str(file)], env=environment, check=False)


def shortage_file(folder: Path, rank: int) -> Path:
    return folder / f"shortage-{rank}.json"
