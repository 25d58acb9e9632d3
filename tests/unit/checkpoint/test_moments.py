"""Moments of Adam that a checkpoint has in another precision: a run goes on with them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.runs import LITTLE, Run, checkpoints, run_trainer

COMMON = {
    **LITTLE,
    **checkpoints(2),
    "optimizer__implementation": "for-loop",
    "training__mixed_precision_param": "float32",
}
MOMENTS = ("float32", "bfloat16", "float8_e4m3fn")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """Two steps with moments of each precision."""
    folder = tmp_path_factory.mktemp("moments")
    started = {m: run_trainer(folder, name=m, **COMMON, optimizer__moments=m, training__steps=2) for m in MOMENTS}
    for run in started.values():
        assert run.status == 0, run.output
    return started


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "now"),
    [
        ("float32", "float8_e4m3fn"),
        ("float8_e4m3fn", "float32"),
        ("float32", "bfloat16"),
        ("float8_e4m3fn", "bfloat16"),
    ],
)
def test_a_run_goes_on_with_converted_moments(runs: dict[str, Run], tmp_path: Path, before: str, now: str) -> None:
    shutil.copytree(runs[before].folder, tmp_path / "run")
    run = run_trainer(tmp_path, **COMMON, optimizer__moments=now, training__steps=4)
    assert run.status == 0, run.output
    bits = {"float32": 32, "bfloat16": 16, "float8_e4m3fn": 8}
    assert f"the moments are converted from {bits[before]} bits to {bits[now]}" in run.output
    shutil.copytree(runs["float32"].folder, tmp_path / "straight")
    straight = run_trainer(tmp_path, name="straight", **COMMON, training__steps=4)
    assert "converted" not in straight.output
    assert run.losses()[2:] == pytest.approx(straight.losses()[2:], rel=5e-3)
