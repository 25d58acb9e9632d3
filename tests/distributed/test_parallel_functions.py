"""The functions that parallelism is made of, on four gloo processes, against what one process computes."""

from __future__ import annotations

import pytest

from tests.distributed import parallel_functions
from tests.distributed.parallel_functions import CHECKS
from tests.support.forks import on_ranks
from tests.support.runs import environment

PROCESSES = 4


@pytest.fixture(scope="module")
def raised(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each check that a process came to raised, by rank; nothing where it held."""
    return on_ranks(PROCESSES, tmp_path_factory.mktemp("functions"), environment(), parallel_functions.report)


@pytest.mark.parametrize("name", CHECKS)
@pytest.mark.slow
def test_it_holds_on_all_processes(raised: list[dict[str, str]], name: str) -> None:
    said = [rank.get(name, "did not end, or never began") for rank in raised]
    failures = [f"rank {i}: {failure}" for i, failure in enumerate(said) if failure]
    assert not failures, "\n".join(failures)
