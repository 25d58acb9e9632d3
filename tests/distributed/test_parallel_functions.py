"""The functions that parallelism is made of, on four gloo processes, against what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import environment
from tests.distributed.parallel_functions import CHECKS

PROCESSES = 4


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each check that a process came to raised, by rank; nothing where it held."""
    folder = tmp_path_factory.mktemp("parallel_functions")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"),
            *(Path(__file__).with_name("parallel_functions.py"), folder),
        ],
        env=environment(OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert (folder / f"rank-{PROCESSES - 1}.json").exists(), done.stdout[-8000:]
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(PROCESSES)]


@pytest.mark.parametrize("name", CHECKS)
def test_it_holds_on_all_processes(raised: list[dict[str, str]], name: str) -> None:
    said = [rank.get(name, "did not end, or never began") for rank in raised]
    failures = [f"rank {i}: {what}" for i, what in enumerate(said) if what]
    assert not failures, "\n".join(failures)
