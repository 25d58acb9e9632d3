"""Checkpoints of weights that are stored in int8: plain tensors, which models of any precision load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.support.runs import LITTLE, Run, checkpoints, run_trainer
from titanlite.inference.load import opened
from titanlite.quant.int8.numerics import amax_of, amax_to_scale, quantize

INT8 = {
    **LITTLE,
    "model__converters": "int8",
    "int8__recipe_name": "weights",
    "int8__filter_fqns": "output",
    "optimizer__implementation": "for-loop",
}
LAYER = "model.layers.0.feed_forward.w2.weight"


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_trainer(tmp_path_factory.mktemp("int8"), **INT8, **checkpoints(1), training__steps=2)
    assert run.status == 0, run.output
    return run


def tensors(folder: Path, step: int, scratch: Path) -> dict[str, Tensor]:
    """What a step has, read by torch alone."""
    dcp_to_torch_save(folder / "checkpoint" / f"step-{step}", scratch)
    loaded: dict[str, Tensor] = torch.load(scratch, weights_only=True)
    return loaded


def test_a_checkpoint_has_plain_tensors(int8: Run, tmp_path: Path) -> None:
    state = tensors(int8.folder, 2, tmp_path / "plain.pt")
    assert all(type(tensor) is Tensor for tensor in state.values())
    assert (state[LAYER].dtype, state[f"{LAYER}_scale"].dtype) == (torch.int8, torch.float32)
    assert state[f"{LAYER}_scale"].shape == (len(state[LAYER]), 1)
    assert state["model.output.weight"].dtype == torch.float32


def test_a_model_in_high_precision_dequantizes_it(int8: Run, tmp_path: Path) -> None:
    state = tensors(int8.folder, 2, tmp_path / "plain.pt")
    folder = int8.folder / "checkpoint" / "step-2"
    with opened(str(folder), "float32") as (loaded, _, _):
        weights = dict(loaded.model.named_parameters())
    expected = state[LAYER].float() * state[f"{LAYER}_scale"]
    assert torch.equal(weights[LAYER.removeprefix("model.")].detach(), expected)


@pytest.mark.parametrize("ngpu", [1, 2])
def test_runs_begin_with_weights_of_another_precision(int8: Run, tmp_path: Path, ngpu: int) -> None:
    """Int8 to float32 and back, also where two ranks have parts of each row: the bytes are those of the whole rows."""
    options = {**LITTLE, "checkpoint__create_seed_checkpoint": "true", **checkpoints(1), "training__steps": 1}
    source = {"checkpoint__initial_load_path": int8.folder / "checkpoint" / "step-2"}
    wide = run_trainer(tmp_path, 1, "wide", **options, **source)
    assert wide.status == 0, wide.output
    state, floats = tensors(int8.folder, 2, tmp_path / "a.pt"), tensors(wide.folder, 0, tmp_path / "b.pt")
    assert torch.equal(floats[LAYER], state[LAYER].float() * state[f"{LAYER}_scale"])
    source = {"checkpoint__initial_load_path": wide.folder / "checkpoint" / "step-0"}
    narrow = run_trainer(
        tmp_path, ngpu, "narrow", **{**options, **source, **INT8}, parallelism__tensor_parallel_degree=ngpu
    )
    assert narrow.status == 0, narrow.output
    again = tensors(narrow.folder, 0, tmp_path / "c.pt")
    for name in state:
        if name.startswith("model.") and f"{name}_scale" in state:
            scale = amax_to_scale(amax_of(floats[name], 1))
            assert torch.equal(again[f"{name}_scale"], scale)
            assert torch.equal(again[name], quantize(floats[name], scale))


@pytest.mark.slow
def test_a_run_goes_on_with_other_shards(int8: Run, tmp_path: Path) -> None:
    """Two processes, each with half of each row, go on where one was."""
    import shutil

    shutil.copytree(int8.folder, tmp_path / "run")
    straight: Any = run_trainer(int8.folder.parent, 1, **INT8, **checkpoints(1), training__steps=4)
    sharded = run_trainer(
        tmp_path, 2, **INT8, **checkpoints(1), training__steps=4, parallelism__tensor_parallel_degree=2
    )
    assert sharded.status == 0, sharded.output
    assert sharded.losses()[2:] == pytest.approx(straight.losses()[2:], rel=3e-4)
