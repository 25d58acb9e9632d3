"""A save of 256 ranks, which are threads of one process, that SIGKILL ends: complete, or not there."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.distributed import many_ranks
from tests.distributed.many_ranks import COLUMNS, RANKS, TENSORS, value_of
from tests.support.forks import Place, join, start
from tests.support.runs import environment
from titanlite.checkpoint.folder import clear_leftovers, saved_steps, step_folder
from titanlite.checkpoint.storage import load, verify

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

PATIENCE = 900  # seconds


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def check_loads(root: Path, step: int) -> None:
    state = {f"w{i}": torch.zeros(RANKS, COLUMNS) for i in range(TENSORS)}
    verify(step_folder(root, step))
    load(step_folder(root, step), state)
    for i in range(TENSORS):
        rows = torch.tensor([float(value_of(step, i, rank)) for rank in range(RANKS)])
        assert torch.equal(state[f"w{i}"], rows[:, None].expand(RANKS, COLUMNS))


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of checkpoints as SIGKILL leaves it at each moment of the save of step 2, by moment.

    One process is really killed. A second one makes the save, and stops at each moment: all its threads stand still,
    and the files are what they would be if it were killed then.
    """
    folder = tmp_path_factory.mktemp("many")
    root, log = folder / "checkpoint", folder / "moments"
    place = Place({**environment(), "OMP_NUM_THREADS": "1"}, folder, folder / "output")
    process = start(place, many_ranks.save_and_be_killed, str(root), f"file {RANKS // 2} of tensors")
    assert join([process], PATIENCE) == [-signal.SIGKILL], place.output.read_text()[-4000:]
    states = {"killed": folder / "killed"}
    shutil.copytree(root, states["killed"])
    assert clear_leftovers(root) == [".partial-step-2"]

    process = start(place, many_ranks.save_in_stops, str(root), str(log))
    end = time.monotonic() + PATIENCE
    try:
        while process.is_alive() and time.monotonic() < end:
            moments = log.read_text().splitlines() if log.exists() else []
            if len(moments) == len(states) and is_stopped(process.pid or 0):  # a new one: it has not gone on yet
                states[moments[-1]] = folder / f"at {len(states)}"
                shutil.copytree(root, states[moments[-1]])
                Path(f"{log}{len(moments)}").touch()
                os.kill(process.pid or 0, signal.SIGCONT)
            time.sleep(0.005)
    finally:
        process.kill()  # a stopped one would stay
    assert join([process], 1) == [0], place.output.read_text()[-4000:]
    states["the end"] = root
    return states


def test_every_moment_was_seen(states: dict[str, Path]) -> None:
    assert list(states) == [
        "killed",
        "the folder",
        "file 1 of tensors",
        "file 128 of tensors",
        "file 256 of tensors",
        ".metadata.tmp, open",
        ".metadata.tmp, os.rename",
        "checkpoint.json, open",
        "SHA256SUMS, open",
        "its flush",
        "its rename",
        "the flush of the folder above it",
        "the end",
    ]


def test_the_save_is_complete_or_not_there_and_the_one_before_loads(states: dict[str, Path]) -> None:
    for moment, root in states.items():
        complete = moment in ("the flush of the folder above it", "the end")
        assert saved_steps(root) == ([1, 2] if complete else [1]), moment
        if moment == "killed":
            assert 0 < len(list((root / ".partial-step-2").glob("*.distcp"))) < RANKS
        check_loads(root, 1)
        if complete:
            check_loads(root, 2)
        clear_leftovers(root)
        assert sorted(path.name for path in root.iterdir()) == ["step-1", "step-2"][: 1 + complete], moment
