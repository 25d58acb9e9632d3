"""A rank that no longer takes part ends the run in time, and the others say for what they have waited, and for whom."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import waiting
from tests.distributed.combinations import WAYS
from tests.distributed.test_parallel import COMMON, SMALL
from tests.support.forks import Place, free_port, join, rank_environment, start
from tests.support.runs import environment

pytestmark = pytest.mark.slow


def statuses_and_output(folder: Path, way: str, absent: int, **options: Any) -> tuple[list[int], str]:
    """Of ranks that wait for one of them, which is ended with the others: the init timeout would be five minutes."""
    given = {**COMMON, **SMALL, **WAYS[way].all_options(), "comm.train_timeout_seconds": 2, **options}
    ranks, port, output = WAYS[way].processes, free_port(), folder / "output.txt"
    processes = []
    for rank in range(ranks):
        place = Place({**environment(), "OMP_NUM_THREADS": "1", **rank_environment(rank, ranks, port)}, folder, output)
        processes.append(start(place, waiting.train, given, absent, folder / "run"))
    return join(processes, timeout=60, patience=5), output.read_text()


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (0, "receive the activations of microbatch 0 of stage 1 from rank 0"),
        (1, "send the activations of microbatch 0 of stage 0 to rank 1"),
    ],
)
def test_a_message_of_a_pipeline_that_does_not_come(tmp_path: Path, absent: int, message: str) -> None:
    statuses, output = statuses_and_output(tmp_path, "PP 2 1F1B", absent)
    assert statuses[1 - absent] == 1
    line = next(line for line in output.splitlines() if "has waited" in line)
    assert re.match(rf"titanlite: rank {1 - absent} has waited [23] s in step 3, more than comm.train_timeout", line)
    assert f"of its pipeline: to {message}" in line
    assert "in _wait_batch_p2p" in output  # the stacks


def test_a_collective_that_a_rank_does_not_call(tmp_path: Path) -> None:
    statuses, output = statuses_and_output(tmp_path, "FSDP 2", absent=1)
    assert statuses[0] == 3
    assert re.search(
        r"titanlite: rank 0 waited too long in \w+ of ranks 0, 1, called in \w+ \(\w+\.py, line \d+\)", output
    )
