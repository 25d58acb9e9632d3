"""Processes that save and load together, on four gloo processes."""

from __future__ import annotations

from pathlib import Path

from tests.distributed import saving
from tests.support.forks import on_ranks
from tests.support.runs import environment


def test_names_are_sent_once_for_each_different_part(tmp_path: Path) -> None:
    expected = {
        "same": [["a", "b"], [0]],
        "two": [["a", "b", "c"], [0, 2]],
        "each": [["0", "1", "2", "3"], [0, 1, 2, 3]],
        "none": [[], [0]],
    }
    assert on_ranks(4, tmp_path / "ranks", environment(), saving.unions) == [expected] * 4
