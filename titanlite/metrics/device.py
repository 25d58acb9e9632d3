"""The peak speed and the memory of the device."""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from titanlite.errors import counted

GIB = 1024**3

# Dense bf16 FLOP/s from the vendors' data sheets (half of the figure "with sparsity"), by whole words of the device's
# name; the first match counts. There is no MFU for a device that is not in this list: its peak is never guessed.
_PEAKS: tuple[tuple[str, float], ...] = (
    ("H100 NVL", 835.5e12),
    ("H100 PCIe", 756.5e12),
    ("H100", 989.5e12),
    ("H200 NVL", 835.5e12),
    ("H200", 989.5e12),
    ("GH200", 989.5e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362.05e12),
    ("RTX 4090", 165.2e12),
    ("MI250X", 191.5e12),  # one of the two dies, which is what a process sees
    ("MI300X", 1307.4e12),
    ("MI325X", 1307.4e12),
)


# Devices that are slower than the one with the same name in the list.
_LESSER = re.compile(r"\bMIG\b|\bLaptop\b|\bRTX 4090 D\b")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def peak_flops(name: str) -> float | None:
    """Return the dense bf16 peak in FLOP/s of the device called ``name``; None if it is not known."""
    if _LESSER.search(name):
        return None
    return next((peak for words, peak in _PEAKS if re.search(rf"\b{words}\b", name)), None)


class Memory(NamedTuple):
    """Peaks since the last reset, in bytes, and the ``total``; ``reserved`` and the counts exist only on CUDA."""

    active: int
    total: int
    reserved: int | None = None
    alloc_retries: int | None = None
    ooms: int | None = None


def total_memory(device: torch.device) -> int:
    """Return the memory of the device in bytes; on the CPU, of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def host_memory() -> int:
    """Return the memory in bytes that all processes of this machine, or container, can have: with what can be swapped
    out, and at most what control groups allow."""
    total = total_memory(torch.device("cpu"))
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        total += int(dict(line.split(":") for line in lines)["SwapTotal"].split()[0]) << 10
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # "max" is no number: there is no limit
            total = min(total, int(Path(file).read_text()))
    return total


def peak_memory(device: torch.device) -> Memory:
    """Return the peak memory: on CUDA, the allocator's since :func:`reset_peak_memory`; on the CPU, the process's peak
    resident set."""
    total = total_memory(device)
    if device.type != "cuda":
        unit = 1 if sys.platform == "darwin" else 1024
        return Memory(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, total)
    stats = torch.cuda.memory_stats(device)
    return Memory(
        active=stats.get("active_bytes.all.peak", 0),
        total=total,
        reserved=stats.get("reserved_bytes.all.peak", 0),
        alloc_retries=stats.get("num_alloc_retries", 0),
        ooms=stats.get("num_ooms", 0),
    )


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


# Messages of torch when a device or one of its libraries is out of memory, for errors without a specific type.
_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|CUDA error: out of memory|"
    r"CU(BLAS|DNN)_STATUS_ALLOC_FAILED"
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Return True if ``error``, or one of its causes, is that a process or a device has no memory left."""
    while error is not None:
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return True
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__
    return False
