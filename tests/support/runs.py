"""Runs of the trainer for tests: most in processes forked from a warm parent, some through the real command."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.support import forks
from tests.support.forks import ROOT
from titanlite.environment import LAUNCH_DIR
from titanlite.errors import ConfigError
from titanlite.launch import launcher
from titanlite.launch.command_line import report, reported

# A process that has used a GPU, or asked for one, cannot be forked: there every run is a real one.
FORKS = not torch.cuda.is_available()


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
# A smaller model for runs of which the model is no matter: with it, most of a run is its start.
LITTLE: dict[str, Any] = {
    "model__args__dim": 64,
    "model__args__n_layers": 2,
    "model__args__n_heads": 4,
    "model__args__n_kv_heads": 2,
    "model__args__ffn_dim": 128,
}


def environment(**extra: str) -> dict[str, str]:
    """That of this process, without what chooses a run or makes triton interpret, and with ``extra``."""
    ours = ("NGPU", "CONFIG_FILE", "LOG_RANK", "RANK", "WORLD_SIZE", "TRITON_INTERPRET")
    kept = {k: v for k, v in os.environ.items() if k not in ours}
    return {**kept, "PYTHONPATH": search_path(), "CONFIG_FILE": "", **extra}


def search_path(*folders: Path) -> str:
    """PYTHONPATH with the repository and ``folders`` before what it has: packages may be installed nowhere else."""
    return os.pathsep.join([str(ROOT), *map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])


def arguments(folder: Path, options: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> list[str]:
    """The trainer's: ``options`` on top of ``base``, by default :data:`TINY`, in the run folder ``folder``."""
    given = {**(TINY if base is None else base), "job.dump_folder": folder, **options}
    return [f"--{key}={value}" for key, value in given.items()]


def command(folder: Path, options: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> list[str]:
    """The real command of a run, as run_train.sh gives it."""
    return [sys.executable, "-m", "titanlite.commands", "train", *arguments(folder, options, base)]


def dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options whose keys have ``__`` for the dot, as keyword arguments must."""
    return {key.replace("__", "."): value for key, value in options.items()}


def run_trainer(
    parent: Path,
    ngpu: int = 1,
    name: str = "run",
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    **options: Any,
) -> Run:
    """One run of the trainer, in the folder ``name`` of ``parent``: what ``NGPU=<ngpu> ./run_train.sh`` does, but that
    this process starts the workers in the launcher's place.

    Options are keys with ``__`` for the dot: ``training__steps=5``.
    """
    folder = parent / name
    place = environment(**{"NGPU": str(ngpu), **(env or {})})
    if FORKS:
        return forked_run(arguments(folder, dotted(options)), place, parent, folder, ngpu, timeout)
    done = subprocess.run(
        command(folder, dotted(options)),
        env=place,
        cwd=parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    return Run(done.returncode, done.stdout, folder)


def forked_run(
    argv: list[str], env: Mapping[str, str], cwd: Path, folder: Path, ngpu: int = 1, timeout: float = 300
) -> Run:
    """The same, with the arguments as a list."""
    with tempfile.TemporaryDirectory(prefix="titanlite-test-") as scratch:
        output, launch_dir = Path(scratch, "output.txt"), Path(scratch, "launch")
        (status,) = forks.join([forks.start(forks.Place(env, cwd, output), launch_alone, argv)], timeout)
        if status == _NEEDS_WORKERS:
            launch_dir.mkdir()
            shared = {"OMP_NUM_THREADS": "1", **env, LAUNCH_DIR: str(launch_dir)}
            port = forks.free_port()
            workers = [
                forks.start(
                    forks.Place({**shared, **forks.rank_environment(rank, ngpu, port)}, cwd, output),
                    *(run_module, "titanlite.train", argv),
                )
                for rank in range(ngpu)
            ]
            status = int(any(forks.join(workers, timeout, patience=30)))
            if reported(str(launch_dir)):
                end = forks.start(forks.Place(env, cwd, output), show_reported, str(launch_dir))
                (status,) = forks.join([end], timeout)
        return Run(status, output.read_text(), folder)


def run_command(folder: Path, *given: str, timeout: float = 300, **env: str) -> subprocess.CompletedProcess[str]:
    """Run ``titanlite`` in ``folder`` with the arguments ``given``, a subcommand first. For ``train``, which becomes
    other processes, there is :func:`forked_run`."""
    place, words = environment(**{"OMP_NUM_THREADS": "1", **env}), ["-m", "titanlite.commands", *given]
    if not FORKS:
        real = [sys.executable, *words]
        return subprocess.run(real, cwd=folder, env=place, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory(prefix="titanlite-test-") as scratch:
        out, err = Path(scratch, "out"), Path(scratch, "err")
        process = forks.start(forks.Place(place, folder, out, err), run_module, "titanlite.commands", list(given))
        (status,) = forks.join([process], timeout)
        return subprocess.CompletedProcess(words, status, out.read_text(), err.read_text())


_NEEDS_WORKERS = 77


def launch_alone(argv: list[str]) -> None:
    """What the launcher does before it starts several processes, or becomes one."""
    try:
        planned = launcher.plan(argv)
    except ConfigError as e:
        sys.exit(report(e))
    if planned.processes > 1:
        sys.exit(_NEEDS_WORKERS)
    os.environ.update(planned.env)
    run_module(planned.module, argv)


def show_reported(launch_dir: str) -> None:
    """What the launcher does when a worker has left a message."""
    sys.exit(launcher.show_reported(launch_dir))


def run_module(name: str, argv: list[str]) -> None:
    """``python -m name argv...`` in this process."""
    sys.argv = [name, *argv]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def checkpoints(interval: int, **options: Any) -> dict[str, Any]:
    """Options for a run with checkpoints that repeats to the bit."""
    common = {"enable_checkpoint": "true", "interval": interval, **options}
    return {f"checkpoint__{key}": value for key, value in common.items()} | {"training__deterministic": "true"}


def faulty(**faults: Any) -> dict[str, Any]:
    """Options for a run with faults, see tests/support/faults.py."""
    env = {name: str(value) for name, value in faults.items()}
    return {"env": env, "experimental__custom_import": "tests.support.faults"}


def saved(folder: Path, step: int) -> dict[str, Any]:
    """What a checkpoint holds, as far as it repeats: the SHA-256 of its tensors' files, and what is not tensors."""
    checkpoint = folder / "checkpoint" / f"step-{step}"
    sums = dict(reversed(line.split("  ")) for line in (checkpoint / "SHA256SUMS").read_text().splitlines()[:-1])
    # .metadata has a number of its own for each save.
    return {**sums, ".metadata": None, "checkpoint.json": json.loads((checkpoint / "checkpoint.json").read_text())}
