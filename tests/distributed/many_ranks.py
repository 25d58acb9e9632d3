"""A worker: one process whose threads are the ranks of a save, as many as no machine has processes for."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from titanlite.checkpoint.folder import INFO, SUMS, partial_folder
from titanlite.checkpoint.plan_cache import PlanCache
from titanlite.checkpoint.storage import Info, save

MODEL = {"name": "llama3", "flavor": "debugmodel", "args": {}}
RANKS, TENSORS, COLUMNS = 256, 3, 4
THREAD_STACK = 1 << 20  # bytes


def value_of(step: int, tensor: int, rank: int) -> int:
    return step * 1_000_000 + tensor * 1000 + rank


class Moments:
    """Calls ``reached`` once with the name of each moment of a save, just before what the name says happens for the
    first time."""

    def __init__(self, root: Path, step: int, reached: Callable[[str], None]) -> None:
        self._root, self._partial, self._call = root, partial_folder(root, step), reached
        self._files, self._names = 0, set[str]()
        self._lock = threading.Lock()

    def _reached(self, name: str) -> None:
        with self._lock:
            is_first = name not in self._names
            self._names.add(name)
        if is_first:
            self._call(name)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        """Be a hook of :func:`sys.addaudithook`."""
        if event not in ("open", "os.mkdir", "os.rename") or not isinstance(args[0], (str, os.PathLike)):
            return
        path = Path(args[0])
        if path == self._partial:
            self._reached({"os.mkdir": "the folder", "os.rename": "its rename"}.get(event, "its flush"))
        elif path == self._root and event == "open":
            self._reached("the flush of the folder above it")
        elif path.parent == self._partial and path.suffix == ".distcp" and event == "open":
            with self._lock:
                self._files += 1
                count = self._files
            if count in (1, RANKS // 2, RANKS):
                self._reached(f"file {count} of tensors")
        elif path.parent == self._partial and path.name in (".metadata.tmp", INFO, SUMS):
            self._reached(f"{path.name}, {event}")


def save_and_be_killed(root: str, moment: str) -> None:
    """Save step 1, then be killed by SIGKILL at this moment of the save of step 2."""

    def kill(name: str) -> None:
        if name == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(Moments(Path(root), 2, kill))
    _save_on_all(Path(root), (1, 2))


def save_in_stops(root: str, log: str) -> None:
    """Save step 2. Before each moment write its name to ``log``, and stop, all threads, until SIGCONT. The thread that
    stops may run a little further before the signal comes, so it waits for the file ``log`` + the moment's number."""
    numbers = itertools.count(1)

    def stop(name: str) -> None:
        number = next(numbers)
        with open(log, "a") as file:
            file.write(f"{name}\n")
        os.kill(os.getpid(), signal.SIGSTOP)
        while not os.path.exists(f"{log}{number}"):
            time.sleep(0.001)

    sys.addaudithook(Moments(Path(root), 2, stop))
    _save_on_all(Path(root), (2,))


def _save_on_all(root: Path, steps: tuple[int, ...]) -> None:
    from torch.testing._internal.distributed.multi_threaded_pg import ProcessLocalGroup, _install_threaded_pg

    _install_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threading.stack_size(THREAD_STACK)
    store = dist.HashStore()  # type: ignore[attr-defined]

    def rank_saves(rank: int) -> None:
        try:
            dist.init_process_group("threaded", rank=rank, world_size=RANKS, store=store)
            mesh = DeviceMesh("cpu", list(range(RANKS)), _init_backend=False)
            plans = PlanCache(f"rank {rank}")  # which all processes of a run call alike, each in its own memory
            for step in steps:
                state = {
                    f"w{i}": DTensor.from_local(
                        torch.full((1, COLUMNS), float(value_of(step, i, rank))),
                        mesh,
                        [Shard(0)],
                        run_check=False,
                        shape=torch.Size((RANKS, COLUMNS)),
                        stride=(COLUMNS, 1),
                    )
                    for i in range(TENSORS)
                }
                save(root, state, Info(step, MODEL, world_size=RANKS), None, plans=plans)
        except BaseException as e:
            traceback.print_exc()
            ProcessLocalGroup.exception_handle(e)  # the others stop waiting
            failed.append(rank)

    failed: list[int] = []
    threads = [threading.Thread(target=rank_saves, args=(rank,)) for rank in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(1)
