"""Stand-ins for other ranks and for the GPU, with which one process builds and runs the part of one rank."""

from __future__ import annotations

import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from titanlite.distributed.waiting import NotedStage

_NO_FORK = "autograd's threading in combination with fork"
START_METHOD = "fork" if sys.platform == "linux" else "spawn"


def in_a_process(function: Callable[..., Any], *args: Any, method: str = START_METHOD) -> Any:
    """Return ``function(*args)`` of another process. Each stage needs one, because DTensor caches process groups that
    no longer exist."""
    context = multiprocessing.get_context(method)
    try:
        with ProcessPoolExecutor(1, context, initializer=end_with, initargs=(os.getpid(),)) as process:
            return process.submit(function, *args).result()
    except (BrokenProcessPool, RuntimeError) as e:
        if method != "fork" or not (isinstance(e, BrokenProcessPool) or _NO_FORK in str(e)):
            raise
        # A fork has no threads of this process, and what waits for one of them can crash; torch for CUDA refuses to
        # compute gradients in it. A new process is safe.
        return in_a_process(function, *args, method="spawn")


def end_with(parent: int) -> None:
    """End this process when ``parent`` ends, also by a signal. Else it would wait for work forever and keep its
    parent's pipes open, so that their readers would wait too."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def lone_process_group(rank: int, world_size: int) -> Iterator[None]:
    """Make a process group in which this process is one rank, and the other ranks do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _never_run(*_: Any) -> Any:
    raise NotImplementedError


class _Answer:
    """The answer on which a stage's neighbours agree: all shapes are known."""

    def item(self) -> int:
        return 1


class LoneStage(NotedStage):
    """A stage whose neighbours do not exist. torch 2.13 sends messages to learn whether all stages know their shapes;
    titanlite's do."""

    def _warmup_forward_vote(self, has_backward: bool, received_acc: Any = None) -> Any:
        return _Answer()

    def _warmup_backward_result(self, received_result: Any = None) -> Any:
        return _Answer()


@contextmanager
def fused_norm() -> Iterator[None]:
    """Let RMSNorm be one operation, as on a GPU: with a registered kernel it is not decomposed. (The tensors without
    data have the device "cpu", because torch without CUDA supports autograd on no other.)"""
    library = torch.library.Library("aten", "IMPL")
    try:
        for name in ("_fused_rms_norm", "_fused_rms_norm_backward"):
            library.impl(name, _never_run, "CPU")
        yield
    finally:
        library._destroy()
