"""The same text from two processes as from one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import generation
from tests.distributed.generation import CASES, VOCAB_SIZE
from tests.support.forks import on_ranks
from tests.support.runs import LITTLE, environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("generation"), environment(), generation.report)


def test_one_process_writes_something(reports: list[dict[str, Any]]) -> None:
    texts = reports[0]["whole"]
    assert texts == reports[1]["whole"]
    assert texts["drawn"] == texts["uncached"]
    assert [len(ids) for ids in texts.values()] == [12, 12, 12]
    assert texts["greedy"] != texts["drawn"]
    assert VOCAB_SIZE / 2 < max(texts["drawn"]) < VOCAB_SIZE


@pytest.mark.parametrize("case", [case for case in CASES if "float8" not in case])
def test_two_processes_write_the_same(reports: list[dict[str, Any]], case: str) -> None:
    for report in reports:
        assert report[case]["texts"] == report["whole"]


def test_both_processes_write_the_same_in_float8(reports: list[dict[str, Any]]) -> None:
    texts = reports[0]["tp in float8"]["texts"]
    assert texts == reports[1]["tp in float8"]["texts"]
    assert [len(ids) for ids in texts.values()] == [12, 12, 12]


@pytest.mark.parametrize("case", CASES)
def test_training_goes_on_as_if_nothing_had_been(reports: list[dict[str, Any]], case: str) -> None:
    for report in reports:
        left = {key: value for key, value in report[case].items() if key != "texts"}
        assert left == {"same step": True, "compiled again": 0, "sharded": True, "training": True}


def test_a_run_on_two_processes_ends_with_one_sample(train: Any) -> None:
    options = {"parallelism__tensor_parallel_degree": 2, "training__compile": "true", "compile__backend": "eager"}
    run = train(2, sample__enable="true", **LITTLE, **options)
    assert run.status == 0, run.output
    assert run.output.count("a sample of what it learned, from 'import' on:\n    import") == 1
    assert "compiled" not in run.output.split("a sample of")[1]
