"""The runtime of one process: device, process groups, seeds, timeouts and garbage collection."""

from __future__ import annotations

import ctypes
import gc
import hashlib
import logging
import os
import platform
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from titanlite.config.schema import Comm
from titanlite.distributed.rejoin import store_of_attempt
from titanlite.environment import LAUNCHER_PID
from titanlite.errors import ConfigError, counted

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """The runtime of this process. ``control`` is a gloo group of all processes, for small messages between hosts."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    why_device: str
    control: dist.ProcessGroup

    def agree_max(self, *values: int) -> list[int]:
        """Return the maximum of each value over all processes, without using a device. It takes a fraction of a
        millisecond for a few processes, more for many, because gloo passes the values around a ring."""
        tensor = torch.tensor(values, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def sum(self, value: int, distinct: int) -> int:
        """Return the sum of the ``distinct`` values, of which each is on equally many processes; it uses no device."""
        total = torch.tensor(value, dtype=torch.int64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.control)
        return int(total) * distinct // self.world_size

    def gather(self, value: object) -> list[Any]:
        """Return ``value`` of every process, by rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def check_same(self, subject: str, value: object) -> None:
        """Raise a ConfigError if the ``repr`` of ``value`` is not the same on all processes."""
        digest = int.from_bytes(hashlib.sha256(repr(value).encode()).digest()[:7], "big")
        largest, smallest = self.agree_max(digest, -digest)
        if largest != -smallest:
            raise ConfigError(
                f"{subject} differ between the processes; rank {self.rank} has {value}: make them the same"
            )

    def on_rank_zero(self, function: Callable[[], None]) -> None:
        """Run ``function`` on rank 0 only. If it raises, all ranks raise the same :class:`ConfigError`; errors of the
        operating system and missing packages become one."""
        error: list[ConfigError | None] = [None]
        if self.rank == 0:
            try:
                function()
            except ConfigError as e:
                error = [e]
            except (OSError, ImportError) as e:
                error = [ConfigError(f"rank 0 could not prepare the run: {type(e).__name__}: {e}")]
        if self.world_size > 1:
            dist.broadcast_object_list(error, src=0, group=self.control)
        if error[0] is not None:
            raise error[0]


def start_runtime(comm: Comm) -> Runtime:
    """Choose the device, and join the process group of torchrun's environment; without one, a group of one process."""
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    device, why = _pick_device(local_rank)
    timeout = timedelta(seconds=comm.init_timeout_seconds)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "cuda":
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(comm.trace_buf_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # a caller of several runs in one process has joined already
        # A single process needs no rendezvous, and therefore no port.
        alone = world_size == 1
        store = dist.HashStore() if alone else store_of_attempt(rank, world_size, timeout)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return Runtime(rank, local_rank, world_size, device, why, control)


def stop_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_freed_memory() -> bool:
    """Make glibc keep up to 1 GiB of freed memory for the next step, and return whether it will. By default it returns
    large tensors to the system and gets them back page by page, with thousands of page faults per step. Other C
    libraries do not have this setting."""
    if platform.libc_ver()[0] != "glibc":
        return False
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    libc = ctypes.CDLL(None)
    largest = 32 << 20  # the maximum that glibc allows
    return bool(libc.mallopt(M_MMAP_THRESHOLD, largest) and libc.mallopt(M_TRIM_THRESHOLD, 1 << 30))


def set_train_timeout(comm: Comm, except_for: dist.ProcessGroup) -> None:
    """Shorten the timeout of collectives after the slow first step, except for one group, whose processes wait for
    disks."""
    timeout = timedelta(seconds=comm.train_timeout_seconds)
    for group in {*dist.distributed_c10d._world.pg_map} - {except_for}:
        _set_pg_timeout(timeout, group)


def _pick_device(local_rank: int) -> tuple[torch.device, str]:
    if not torch.cuda.is_available():
        return torch.device("cpu"), "no GPU that this build of torch can use was found"
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"NGPU: process {local_rank} of this machine has no GPU of its own, there "
            f"{'is' if count == 1 else 'are'} {count}; use fewer processes"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device, f"GPU {local_rank} of the {count} found"


def set_seed(seed: int | None, deterministic: bool, runtime: Runtime) -> int:
    """Seed every generator with the same seed on all processes, and return the seed; rank 0 draws it if it is None."""
    if seed is None:
        seed = runtime.agree_max(random.SystemRandom().randrange(1 << 31) if runtime.rank == 0 else -1)[0]
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # for other libraries; titanlite does not use it
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    return seed


class GarbageCollection:
    """Garbage collection at fixed steps, so that all ranks pause at the same time."""

    def __init__(self, every: int, debug: bool) -> None:
        self._every, self._debug = every, debug
        gc.disable()
        self._collect(0)

    def run(self, step: int) -> None:
        if step > 1 and step % self._every == 0:
            self._collect(step)

    def _collect(self, step: int) -> None:
        start = time.perf_counter()
        # Generation 1 has the garbage of training steps. The oldest one grows with the model and is slow to scan.
        objects = gc.collect(1)
        if self._debug:
            logger.info(
                "garbage collection at step %d: %s, %.3f s",
                step,
                counted(objects, "object"),
                time.perf_counter() - start,
            )

    def close(self) -> None:
        gc.enable()


def end_with_launcher() -> None:
    """End this worker if its launcher is killed."""
    pid = os.environ.get(LAUNCHER_PID)
    if pid is None:
        return
    if platform.system() == "Linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == int(pid):
            time.sleep(1)
        os._exit(1)

    # Other systems have only this polling. On Linux it catches a launcher that died before prctl.
    threading.Thread(target=watch, name="launcher-watch", daemon=True).start()
