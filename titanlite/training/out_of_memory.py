"""The report of a run that is out of memory: the rank, the place in the code, the step, and options that save memory.

:mod:`titanlite.plan.advice` estimates these options in a separate process. The launcher starts it after its workers
have ended; a run of a single process starts it itself.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from titanlite.config import JobConfig, dump_toml
from titanlite.converters import native_formats
from titanlite.environment import LAUNCH_DIR
from titanlite.errors import TrainingError
from titanlite.launch.command_line import report
from titanlite.launch.shortage import Shortage, advise, shortage_file
from titanlite.metrics.device import is_out_of_memory
from titanlite.metrics.report import shown_path

_PAGE = os.sysconf("SC_PAGE_SIZE")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def give_up(error: Exception, config: JobConfig, step: int, snapshot: Path | None) -> int:
    """Report that memory ran out in ``step`` (0: before the first), and return the exit status."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cause = _cause(error)
    when = f"in step {step}" if step else "before the first step"
    lines = [f"rank {rank} ran out of memory {when}, {_place(cause)}", f"{type(cause).__name__}: {_text(cause)}"]
    if snapshot is not None:
        lines.append(f"memory snapshot, for https://pytorch.org/memory_viz: {shown_path(str(snapshot))}")
    traceback.clear_frames(error.__traceback__)  # free the memory of their variables
    shortage = _shortage(cause, config, rank, world_size)
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        shortage_file(Path(folder), rank).write_text(json.dumps(asdict(shortage)))
    elif world_size > 1:
        lines.append("run_train.sh, in place of torchrun, would estimate here which options save how much")
    status = report(TrainingError("\n    ".join(lines)))
    if not folder and world_size == 1:
        with tempfile.TemporaryDirectory(prefix="titanlite-") as temporary:
            shortage_file(Path(temporary), rank).write_text(json.dumps(asdict(shortage)))
            advise(Path(temporary), rank)
    return status


def _cause(error: BaseException) -> BaseException:
    """Return the first error of the chain that is about memory; pipeline schedules wrap the errors of their stages."""
    while error.__cause__ is not None and is_out_of_memory(error.__cause__):
        error = error.__cause__
    return error


def _place(error: BaseException) -> str:
    """Describe the innermost line of the traceback outside torch."""
    inside = os.path.dirname(torch.__file__)
    frames = traceback.extract_tb(error.__traceback__)
    user_frames = [frame for frame in frames if not frame.filename.startswith((inside, "<"))]
    if not user_frames:
        return "at a place that is not known"
    frame = user_frames[-1]
    return f"at {shown_path(frame.filename)}:{frame.lineno}, in {frame.name}: {frame.line}"


def _text(error: BaseException) -> str:
    return " ".join(str(error).split()) or "Python has no memory left"


def _shortage(error: BaseException, config: JobConfig, rank: int, world_size: int) -> Shortage:
    on_gpu = torch.cuda.is_available()
    requested = re.search(r"[Tt]ried to allocate ([\d.]+) (bytes|[KMG]iB)", str(error))
    return Shortage(
        rank=rank,
        world_size=world_size,
        device="cuda" if on_gpu else "cpu",
        room=_room_on_gpu() if on_gpu else _room_on_cpu(),
        requested=int(float(requested[1]) * _UNITS[requested[2]]) if requested else 0,
        unused=torch.cuda.memory_reserved() - torch.cuda.memory_allocated() if on_gpu else 0,
        native_formats=native_formats(torch.device("cuda" if on_gpu else "cpu")),
        config=dump_toml(config),
        device_name=torch.cuda.get_device_name() if on_gpu else "",
    )


def _room_on_gpu() -> int:
    free, total = torch.cuda.mem_get_info()
    allowed = int(torch.cuda.get_per_process_memory_fraction() * total)
    return min(free + torch.cuda.memory_reserved(), allowed)


def _statm() -> tuple[int, int]:
    """Return the virtual and the resident memory of this process in bytes, on Linux."""
    virtual, resident, *_ = Path("/proc/self/statm").read_text().split()
    return int(virtual) * _PAGE, int(resident) * _PAGE


# The resident memory of the process without a model, which tensors cannot use.
_RESIDENT_AT_START = _statm()[1] if Path("/proc/self/statm").exists() else 0


def _room_on_cpu() -> int | None:
    """Return the memory for tensors in bytes: the resident part beyond the program's, and the free part. Free is the
    least of the machine's memory, the container's (cgroup v2) and ``ulimit -v``. None if the system does not say."""
    try:
        virtual, resident = _statm()
        meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    free = [int(meminfo["MemAvailable"].split()[0]) << 10]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - virtual)
    group = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no limit
        free.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    return max(0, min(free)) + max(0, resident - _RESIDENT_AT_START)
