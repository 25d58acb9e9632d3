"""Saves on four gloo processes: plans are made once, and made anew where the tensors are others or a save failed."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import saving
from tests.support.forks import on_ranks
from tests.support.runs import environment


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saving")
    return on_ranks(4, folder / "ranks", environment(), saving.report, str(folder))


def test_a_plan_is_made_once_for_the_same_tensors(ranks: list[dict[str, Any]]) -> None:
    steps = [step for step in ranks[0] if step.startswith("step")]
    assert [step for step in steps if ranks[0][step]["planned"]] == ["step 1", "step 3", "step 6", "step 8"]
    assert [step for step in steps if not all(rank[step]["same"] for rank in ranks)] == []


def test_a_save_that_fails_leaves_no_plan(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "step 5" not in rank
        assert rank["failed"] == ranks[0]["failed"]
        assert rank["kept after a failure"] == 0


def test_an_error_of_the_writing_process_is_that_of_the_save(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["full"] == "rank 1: [Errno 28] No space left on device: '/dev/full'"


def test_the_writing_process_gets_places_and_writes_the_files_of_dcp(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["sent"]["is DCP's"]
        assert rank["sent"]["largest"] <= 4096


def test_names_are_sent_once_for_each_different_part(ranks: list[dict[str, Any]]) -> None:
    expected = {
        "same": [["a", "b"], [0]],
        "two": [["a", "b", "c"], [0, 2]],
        "each": [["0", "1", "2", "3"], [0, 1, 2, 3]],
        "none": [[], [0]],
    }
    assert [rank["unions"] for rank in ranks] == [expected] * 4


def test_the_first_copy_in_the_background_writes_each_byte_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["copied"] == [rank["local bytes"]] * 2
        assert rank["copies are equal"]
