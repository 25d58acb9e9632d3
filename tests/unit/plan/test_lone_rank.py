"""Work in a process of its own, also where a fork cannot do it."""

from __future__ import annotations

from pathlib import Path

import pytest

from titanlite.plan.lone_rank import in_a_process


def _fails_first(file: Path, message: str) -> str:
    if not file.exists():
        file.touch()
        raise RuntimeError(message)
    return "done"


@pytest.mark.slow
def test_what_a_fork_cannot_do_a_new_process_does(tmp_path: Path) -> None:
    """As torch for CUDA says it, after gradients were computed in the process that forks."""
    message = "Unable to handle autograd's threading in combination with fork-based multiprocessing."
    assert in_a_process(_fails_first, tmp_path / "first", message) == "done"


def test_other_errors_are_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        in_a_process(_fails_first, tmp_path / "first", "no such thing")
