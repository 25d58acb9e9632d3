"""Weights that torchtitan has saved: DCP folders with its names, and its order of the features of a head."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.support.hostile import Payload
from tests.support.runs import Run, checkpoints, run_trainer
from titanlite.checkpoint.storage import load, saved_shapes
from titanlite.checkpoint.torchtitan import TorchtitanFolder
from titanlite.commands import convert
from titanlite.models.layers.rotary import apply_rope, rope_table

HEADS, HEAD = 16, 16  # of the debug model


def in_pairs(weight: Tensor, head_size: int) -> Tensor:
    """The rows of a projection in torchtitan's order, in which the features 2i and 2i + 1 are rotated together."""
    return torch.stack(
        [weight[head + half * head_size // 2 + i]
         for head in range(0, len(weight), head_size) for i in range(head_size // 2) for half in (0, 1)]
    )  # fmt: skip


class State:
    """What torchtitan saves beside the weights: objects with a state of their own."""

    def __init__(self, **values: Any) -> None:
        self.values = values

    def state_dict(self) -> dict[str, Any]:
        return self.values

    def load_state_dict(self, values: dict[str, Any]) -> None:
        raise AssertionError


def write(folder: Path, weights: dict[str, Tensor], flat: bool, marker: Path) -> None:
    """Save as torchtitan does: of June 2025, with the names of the model beside the others; before, below "model"."""
    theirs = {
        name: in_pairs(weight, HEAD) if name.endswith(("wq.weight", "wk.weight")) else weight
        for name, weight in weights.items()
    }
    names = io.BytesIO(b"not a tensor")
    state: dict[str, Any] = {
        "optimizer": {
            f"{kind}.{name}.{key}": value
            for name, weight in weights.items()
            for kind, key, value in (("state", "exp_avg", weight * 0), ("param_groups", "lr", 1e-3))
        },
        "lr_scheduler": State(last_epoch=7, _step_count=8),
        "train_state": State(step=torch.tensor(7), ntokens_seen=1000, losses=names),
        "dataloader": State(dp_rank_0=Payload(marker)),
        **(theirs if flat else {"model": {**theirs, "freqs_cis": torch.ones(64, 8, dtype=torch.complex64)}}),
    }
    dcp.save(state, checkpoint_id=folder, no_dist=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = run_trainer(tmp_path_factory.mktemp("trained"), **checkpoints(2), training__steps=2)
    assert run.status == 0, run.output
    return run


@pytest.fixture(scope="module")
def weights(trained: Run) -> dict[str, Tensor]:
    folder = trained.folder / "checkpoint" / "step-2"
    state = {n: torch.empty(shape) for n, shape in saved_shapes(folder).items() if n.startswith("model.")}
    load(folder, state)
    return {name.removeprefix("model."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.slow
def test_a_run_begins_with_its_weights(trained: Run, weights: dict[str, Tensor], tmp_path: Path, flat: bool) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "theirs" / "step-7", weights, flat, marker)
    same = run_trainer(tmp_path, name="same", checkpoint__initial_load_path=trained.folder / "checkpoint")
    options = {"ngpu": 2, "training__local_batch_size": 2} if flat else {}
    run = run_trainer(tmp_path, checkpoint__initial_load_path=tmp_path / "theirs", **options)
    assert run.status == same.status == 0, run.output
    assert "torchtitan's weights" in run.output
    assert run.losses() == pytest.approx(same.losses(), abs=2e-3 if flat else 0)
    assert run.rows()[0]["step"] == 1
    assert not marker.exists()  # the place in the data is a pickle: it is not read


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_weights_of_another_model_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    changed = dict(weights)
    changed["layers.9.attention.wq.weight"] = changed.pop("layers.5.attention.wq.weight")
    changed["output.weight"] = torch.zeros(100, 256)
    write(tmp_path / "theirs", changed, True, tmp_path / "marker")
    run = run_trainer(tmp_path, checkpoint__initial_load_path=tmp_path / "theirs")
    assert run.status == 2
    assert "Traceback" not in run.output
    for part in (
        "1 is not in its files: layers.5.attention.wq.weight",
        "1 is in its files and not in the model: layers.9.attention.wq.weight",
        "output.weight [100, 256], in the model [2048, 256]",
    ):
        assert part in run.output
    options = {"checkpoint__initial_load_model_weights_only": "false"}
    run = run_trainer(tmp_path, checkpoint__initial_load_path=tmp_path / "theirs", **options)
    assert (run.status, "has weights alone" in run.output) == (2, True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_a_folder_without_a_description_is_for(
    weights: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "theirs", weights, True, tmp_path / "marker")
    assert convert.main([str(tmp_path / "theirs"), str(tmp_path / "out")]) == 2
    assert "train with --checkpoint.initial_load_path" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_rotated_heads_give_the_scores_of_torchtitan(tmp_path: Path) -> None:
    """Against a rotation by complex numbers, which takes the features 2i and 2i + 1 of a head as one number."""
    torch.manual_seed(0)
    name = "layers.0.attention.wq.weight"
    theirs = torch.randn(4 * HEAD, 32)
    dcp.save({name: theirs}, checkpoint_id=tmp_path, no_dist=True)
    ours = torch.empty_like(theirs)
    TorchtitanFolder(tmp_path)._copy(name, ours, HEAD)
    x = torch.randn(1, 10, 32)
    angles = torch.outer(torch.arange(10.0), 10000.0 ** -(torch.arange(0, HEAD, 2) / HEAD))
    pairs = torch.view_as_complex((x @ theirs.t()).view(1, 10, 4, HEAD // 2, 2))
    expected = torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[:, None]).flatten(3)
    rotated = apply_rope((x @ ours.t()).view(1, 10, 4, HEAD), rope_table(10, HEAD, 10000.0))
    scores, reference = (torch.einsum("bqhd,bkhd->bhqk", y, y) for y in (rotated, expected))
    torch.testing.assert_close(scores, reference, rtol=1e-5, atol=1e-4)
