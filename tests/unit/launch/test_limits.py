"""Limits that the launcher sets for its workers."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from titanlite.launch.limits import ALLOCATOR, descriptors_needed, let_segments_grow

SCRIPT = """
import resource, sys
from titanlite.launch.limits import raise_descriptor_limit
soft, hard, ranks = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
now = raise_descriptor_limit(ranks)
assert now == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
files = [open("/dev/null") for _ in range(now - 20)]  # the limit is real
print(now)
"""


def limited(soft: int, hard: int, ranks: int) -> tuple[int, str]:
    """Return the limit that a process with these limits sets for so many ranks, and what it says."""
    command = [sys.executable, "-c", SCRIPT, *map(str, (soft, hard, ranks))]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "TITANLITE_SAID": ""})
    return int(run.stdout), run.stderr


def test_the_limit_of_open_files_grows_with_the_ranks_as_far_as_the_machine_allows() -> None:
    hard = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1] % (1 << 63), 8192)
    assert limited(256, hard, 400) == (descriptors_needed(400), "")
    assert limited(1024, hard, 2) == (1024, "")  # never lowered
    limit, message = limited(256, 900, 1024)
    assert limit == 900
    assert "1024 ranks need about 3584 open files and sockets each" in message
    assert "allows a process 900" in message


def test_segments_grow_where_the_driver_can_unless_the_user_says_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PYTORCH_ALLOC_CONF", raising=False)
    monkeypatch.setenv(ALLOCATOR, "max_split_size_mb:128")
    assert not let_segments_grow(tmp_path)
    assert os.environ[ALLOCATOR] == "max_split_size_mb:128"
    monkeypatch.delenv(ALLOCATOR)
    assert not let_segments_grow(tmp_path / "no driver")
    assert ALLOCATOR not in os.environ
    assert let_segments_grow(tmp_path)
    assert os.environ[ALLOCATOR] == "expandable_segments:True"
