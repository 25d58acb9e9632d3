"""What the launcher sets before the workers start: how many files each may open, and how CUDA's allocator reserves."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from titanlite.environment import say_once

PER_RANK = 3  # measured: a process opens two to three sockets for each further rank (gloo's groups, the store, NCCL)
OWN_FILES = 512  # the files of a process: libraries, data, logs, its checkpoint, the threads of the compiler

ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_ALLOCATOR_NAMES = (ALLOCATOR, "PYTORCH_ALLOC_CONF")  # torch reads both


def descriptors_needed(ranks: int) -> int:
    """Return how many files and sockets a process opens at most in a run of so many ranks."""
    return OWN_FILES + PER_RANK * ranks


def raise_descriptor_limit(ranks: int) -> int:
    """Raise the soft limit of open files of this process, which the workers inherit, to what the run needs.

    Where the hard limit is lower, set that, and print what will be missing. The limit is never lowered.

    Returns:
        The soft limit now.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = descriptors_needed(ranks)
    if _at_least(soft, needed):
        return soft
    raised = needed if _at_least(hard, needed) else hard
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError):  # macOS has a lower limit that it does not tell
        raised = soft
    if raised < needed:
        say_once(
            f"titanlite: warning: {ranks} ranks need about {needed} open files and sockets each, and this machine "
            f"allows a process {raised}; raise the hard limit (ulimit -Hn, LimitNOFILE= of systemd, or nofile in "
            "/etc/security/limits.conf), else the start may fail with 'Too many open files'"
        )
    return raised


def let_segments_grow(device: Path = Path("/dev/nvidiactl")) -> bool:
    """Let CUDA's allocator map its segments piece by piece, so that memory is not lost between them. A value that the
    user gave stays. Return True if it was set.

    Args:
        device: a file that is there where the driver can do it. It is not on ROCm and in Windows' Linux, where torch
            would print a warning in each process.
    """
    if any(name in os.environ for name in _ALLOCATOR_NAMES) or not device.exists():
        return False
    os.environ[ALLOCATOR] = "expandable_segments:True"
    return True


def _at_least(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
