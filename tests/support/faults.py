"""Faults for runs of the trainer, see ``faulty`` in conftest.py; the environment says which.

``KILL_AFTER=n``: the process is killed (SIGKILL) after its n-th optimizer step, once the folder ``KILL_NEEDS`` is
there.
``OOM_AT=n``: from its n-th forward on, the process of rank ``OOM_RANK`` can have 24 MB more, and no more.
``SLOW_WRITES=s``: each write to a checkpoint's files takes so many seconds longer.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.writer_process import SentFile
from titanlite.converters import register_converter


def _slow(write: Any) -> Any:
    def slow_write(self: object, data: Any) -> Any:
        time.sleep(float(os.environ["SLOW_WRITES"]))
        return write(self, data)

    return slow_write


if "SLOW_WRITES" in os.environ:
    for file in (HashingFile, SentFile):
        file.write = _slow(file.write)  # type: ignore[method-assign]


@register_converter("fault")
class Fault:
    def __init__(self, config: Any, mesh: Any) -> None:
        self.left = int(os.environ.get("KILL_AFTER", 0))
        self.oom_at = int(os.environ.get("OOM_AT", 0))
        if self.oom_at:
            # What is freed goes back to the system, as in a run on a GPU; what the process keeps would outlast a limit.
            M_MMAP_THRESHOLD = -3
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 128 << 10)

    def convert(self, model: nn.Module) -> str:
        if self.oom_at and os.environ.get("RANK", "0") == os.environ["OOM_RANK"]:
            model.register_forward_pre_hook(self.forward)
        return "may end suddenly"

    def forward(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.oom_at -= type(inputs[0]) is Tensor  # no estimate's
        if self.oom_at == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * os.sysconf("SC_PAGE_SIZE") + 24_000_000
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))

    def post_optimizer_hook(self, model: nn.Module) -> None:
        self.left -= 1
        if self.left == 0:
            while not Path(os.environ["KILL_NEEDS"]).exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
