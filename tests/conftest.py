"""Shared by all tests: runs of the real command, in processes of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton's own modules when they are first imported

# Shells start jobs in the background with SIGINT ignored, which processes inherit; tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parents[1]


@dataclass
class Run:
    """A finished run of the trainer."""

    status: int
    output: str
    folder: Path

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]


# The smallest run that is still a run: a few steps of the debug model on short sequences.
TINY = {
    "training.steps": 3,
    "training.seq_len": 32,
    "training.local_batch_size": 4,
    "training.seed": 0,
    "metrics.log_freq": 1,
    "metrics.enable_tensorboard": "false",
    "activation_checkpoint.mode": "none",
    "lr_scheduler.warmup_steps": 2,
    "sample.enable": "false",
}


def environment(**extra: str) -> dict[str, str]:
    own = ("NGPU", "CONFIG_FILE", "LOG_RANK", "RANK", "WORLD_SIZE", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in own}
    return {**kept, "PYTHONPATH": search_path(), "CONFIG_FILE": "", **extra}


def search_path(*folders: Path) -> str:
    """PYTHONPATH with the repository and ``folders`` before what it has: packages may be installed nowhere else."""
    return os.pathsep.join([str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def command(folder: Path, options: dict[str, Any], base: dict[str, Any] | None = None) -> list[str]:
    given = {**(TINY if base is None else base), "job.dump_folder": folder, **options}
    return [sys.executable, "-m", "titanlite.launch", *(f"--{key}={value}" for key, value in given.items())]


def run_trainer(
    parent: Path,
    ngpu: int = 1,
    name: str = "run",
    env: dict[str, str] | None = None,
    timeout: float = 300,
    **options: Any,
) -> Run:
    """One run of the trainer on the CPU, in the folder ``name`` of ``parent``.

    Options are keys with ``__`` for the dot: ``training__steps=5``.
    """
    folder = parent / name
    done = subprocess.run(
        command(folder, {key.replace("__", "."): value for key, value in options.items()}),
        env=environment(**{"NGPU": str(ngpu), **(env or {})}),
        cwd=parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout, folder)


def checkpoints(interval: int, **options: Any) -> dict[str, Any]:
    """Options for a run with checkpoints that repeats to the bit."""
    common = {"enable_checkpoint": "true", "interval": interval, **options}
    return {f"checkpoint__{key}": value for key, value in common.items()} | {"training__deterministic": "true"}


def faulty(**faults: Any) -> dict[str, Any]:
    """Options for a run with faults, see faults.py."""
    env = {"PYTHONPATH": search_path(ROOT / "tests"), **{name: str(value) for name, value in faults.items()}}
    return {"env": env, "experimental__custom_import": "faults"}


def saved(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds, as far as it repeats: the SHA-256 of its tensors' files, and what is not tensors."""
    checkpoint = folder / "checkpoint" / f"step-{step}"
    sums = dict(reversed(line.split("  ")) for line in (checkpoint / "SHA256SUMS").read_text().splitlines()[:-1])
    # .metadata has a number of its own for each save.
    return {**sums, ".metadata": None, "checkpoint.json": json.loads((checkpoint / "checkpoint.json").read_text())}


@pytest.fixture(autouse=True, scope="module")
def compiler() -> None:
    """Each file starts with a compiler that remembers nothing: which files share a process is chance."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@pytest.fixture
def train(tmp_path: Path) -> Any:
    """:func:`run_trainer` in the test's own folder."""
    return partial(run_trainer, tmp_path)
