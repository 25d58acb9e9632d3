"""Processes for tests, forked from one warm parent that has imported torch: they start in milliseconds, not seconds.

Each is as fresh as a new interpreter, but for the imports: its environment, folder, arguments and output are its own.
"""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.warm"])


@dataclass(frozen=True)
class Place:
    """Where a process runs.

    Attributes:
        env: its whole environment.
        output: the file that takes its stdout and stderr.
        errors: the file that takes its stderr, if that is another.
    """

    env: Mapping[str, str]
    folder: Path
    output: Path
    errors: Path | None = None


def start(place: Place, function: Callable[..., Any], *args: Any) -> ForkServerProcess:
    """Call ``function(*args)`` in a new process; its exit status is what ``SystemExit`` says, 1 after any other error,
    else 0."""
    _ensure_parent()
    process = _context.Process(target=_run, args=(place, function, args))
    process.start()
    return process


def _ensure_parent() -> None:
    """Start the warm parent, with the environment that programs have and tests change."""
    from multiprocessing import forkserver

    changed = {"TRITON_INTERPRET": None, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    before = {name: os.environ.get(name) for name in changed}
    _set_environment(changed)
    try:
        forkserver.ensure_running()
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _run(place: Place, function: Callable[..., Any], args: Sequence[Any]) -> None:
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for stream, file in ((1, place.output), (2, place.errors or place.output)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (for as long as the process lives)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(place.env)
    os.chdir(place.folder)
    sys.path[:0] = [str(place.folder), *filter(None, place.env.get("PYTHONPATH", "").split(os.pathsep))]
    import torch

    torch.set_num_threads(int(place.env.get("OMP_NUM_THREADS") or 1))  # tests run side by side
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def join(processes: Sequence[ForkServerProcess], timeout: float, patience: float = 0) -> list[int]:
    """Wait for all of them; once one fails the others are asked to end, and killed after ``patience`` seconds more.
    Returns their exit statuses.

    Raises:
        TimeoutError: none failed, and one is still running after ``timeout`` seconds.
    """
    end = time.monotonic() + timeout
    asked = False
    while running := [p for p in processes if p.exitcode is None]:
        failed = any(p.exitcode for p in processes)
        if failed and not asked:
            asked, end = True, time.monotonic() + patience
            for process in running:
                process.terminate()
        if not wait([p.sentinel for p in running], max(0, end - time.monotonic())):
            for process in running:
                process.kill()
                process.join()
            if not failed:
                raise TimeoutError(f"{len(running)} of {len(processes)} processes had not ended after {timeout:.0f} s")
    return [p.exitcode or 0 for p in processes]


def rank_environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun sets for a process of one machine."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    return {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "localhost"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port: int = probe.getsockname()[1]
        return port


def on_ranks(
    ranks: int, folder: Path, env: Mapping[str, str], function: Callable[..., Any], *args: Any, timeout: float = 300
) -> list[Any]:
    """Call ``function(*args)`` in ``ranks`` processes that can make a process group; returns what each returned, as it
    comes back from JSON, by rank.

    Args:
        folder: of this call alone; it has the output of all ranks afterwards.

    Raises:
        AssertionError: a process failed; with the end of its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output, port = folder / "output.txt", free_port()
    results = [folder / f"result-{rank}.json" for rank in range(ranks)]
    processes = []
    for rank, result in enumerate(results):
        place = Place({"OMP_NUM_THREADS": "1", **env, **rank_environment(rank, ranks, port)}, folder, output)
        processes.append(start(place, _report, result, function, args))
    try:
        statuses = join(processes, timeout)
    except TimeoutError as e:
        raise AssertionError(f"{e}:\n{output.read_text()[-8000:]}") from None
    assert statuses == [0] * ranks, f"statuses {statuses}:\n{output.read_text()[-8000:]}"
    return [json.loads(result.read_text()) for result in results]


def _report(result: Path, function: Callable[..., Any], args: Sequence[Any]) -> None:
    result.write_text(json.dumps(function(*args)))
