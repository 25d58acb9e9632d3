"""A run of a model with experts: what it tells, what it refuses, and what an estimate of it counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from tests.support.runs import TINY, checkpoints, run_trainer
from titanlite.checkpoint.metadata import read_metadata
from titanlite.checkpoint.storage import load
from titanlite.config import load_config, resolve_degrees
from titanlite.distributed.mesh import build_mesh
from titanlite.distributed.parallelize import check
from titanlite.errors import ConfigError
from titanlite.metrics.flops import flops_per_token
from titanlite.models.layers import LAYOUT, Decoder
from titanlite.models.spec import get_model_spec
from titanlite.plan.estimate import estimate
from titanlite.plan.lone_rank import lone_process_group
from titanlite.training.build import build_model
from titanlite.training.model_shape import choose_shape

SIZES = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "n_experts": 6,
    "experts_per_token": 2,
    "expert_dim": 16,
}
EP, TP, CP = (f"parallelism.{name}_parallel_degree" for name in ("expert", "tensor", "context"))
DEEPSEEK = {"model.name": "deepseek_v3", "model.flavor": "671B"}
SMALL = {"model.name": "qwen3_moe"} | {f"model.args.{name}": size for name, size in SIZES.items()}


def test_a_run_tells_the_load_of_its_experts(train: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {key.replace(".", "__"): value for key, value in SMALL.items()}
    options |= {"metrics__enable_tensorboard": "true", "metrics__log_freq": 2, "training__steps": 4}
    run = train(**options, activation_checkpoint__mode="full")
    assert run.status == 0, run.output
    assert "2 of 6 experts for each token, bfloat16; balance loss 0.001, z-loss 0" in run.output
    steps = [1, 1, 2]  # in each window
    for row, count in zip(run.rows(), steps, strict=True):
        assert [*row["expert_tokens"]] == ["layers.0.feed_forward", "layers.1.feed_forward"]
        # Each token once for each of its experts, though its block is computed twice.
        assert all(sum(tokens) == count * 4 * 32 * 2 for tokens in row["expert_tokens"].values())
        largest = max(max(tokens) for tokens in row["expert_tokens"].values()) / (count * 4 * 32 * 2)
        assert row["expert_largest_share"] == pytest.approx(largest)
        assert 0 < row["router_entropy"] < 1.8
        assert 2 * 0.001 * 2 <= row["balance_loss"] < 2 * 0.001 * 3  # layers, coefficient, experts per token
        assert (
            f"largest {largest:.1%} (16.7%)  rows at a time: {4 * 32 * 2}  entropy: {row['router_entropy']:.3f}"
            in run.output
        )
    (folder,) = (run.folder / "tb").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {"experts/largest_share", "experts/router_entropy", "experts/balance_loss"} <= {*tags}
    assert (
        events.Scalars("experts/tokens/layers.1.feed_forward/5")[-1].value
        == run.rows()[-1]["expert_tokens"]["layers.1.feed_forward"][5]
    )


def tensors_in(folder: Path) -> dict[str, Tensor]:
    saved = read_metadata(folder)
    state = {name: torch.empty(tensor.shape, dtype=torch.float64) for name, tensor in saved.items()}
    load(folder, state, saved=saved)
    return state


@pytest.mark.slow
def test_biases_move_and_a_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 2, "n_kv_heads": 2, "n_experts": 8, "expert_dim": 16}
    options: dict[str, Any] = {f"model__args__{name}": size for name, size in sizes.items()}
    options |= {"model__name": "deepseek_v3", "experts__bias_update_rate": 0.25, "training__steps": 5}
    run = run_trainer(tmp_path, **options, **checkpoints(2))
    assert run.status == 0, run.output
    last, whole = run.folder / "checkpoint" / "step-5", run.rows()
    one = tensors_in(last)
    for folder in (last, last.with_name("step-4")):
        shutil.rmtree(folder)
    run = run_trainer(tmp_path, **options, **checkpoints(2))
    assert run.status == 0, run.output
    assert [row["expert_tokens"] for row in run.rows()] == [row["expert_tokens"] for row in whole]
    other = tensors_in(last)
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=0, equal_nan=True)
    biases = [value for name, value in one.items() if name.endswith("router.bias")]
    assert len(biases) == 2  # the first block is dense
    for bias in biases:
        assert bias.abs().max() > 0  # an odd number of moves, up or down
        assert torch.equal(bias * 4, (bias * 4).round())
        assert bias.abs().max() <= 5 * 0.25


@pytest.mark.parametrize(
    ("options", "key", "why"),
    [
        ({"parallelism.expert_parallel_degree": 2, "model.args.n_experts": 15}, EP, "must divide the 15 experts"),
        ({"parallelism.expert_parallel_degree": 2, "model.name": "llama3"}, EP, "no experts"),
        ({"experts.bias_update_rate": 0.1}, "experts.bias_update_rate", "no bias"),
        ({"experts.balance_loss": 0, "experts.balance_loss_over": "batch"}, "experts.balance_loss_over", "no effect"),
        ({"experts.z_loss": 0.1, "model.name": "llama3"}, "experts.z_loss", "no experts"),
        ({**DEEPSEEK, TP: 128}, TP, "model's latent.kv_features = 576"),
        # 8 processes; the same experts are on 4 of them.
        ({EP: 2, "model.args.n_experts": 6, "model.args.expert_dim": 30}, EP, "3 experts to each .* 30 inside"),
        ({EP: 2, "model.args.n_experts": 6, "model.args.dim": 90, "model.args.head_dim": 32}, EP, "90 of a token"),
    ],
)
def test_what_does_not_go_with_experts_is_refused(options: dict[str, Any], key: str, why: str) -> None:
    """Before anything is built: the largest models take no time and no memory."""
    config = load_config([f"--{name}={value}" for name, value in {"model.name": "qwen3_moe", **options}.items()])
    shape, world_size = choose_shape(config), 8 if "experts to each" in why or "of a token" in why else 2
    world_size = options.get(TP, world_size)
    args = shape.spec.configure(shape.flavor, 2048, 64)
    begin = memory_now()
    with lone_process_group(0, world_size):
        degrees = resolve_degrees(config.parallelism, world_size)
        mesh = build_mesh(degrees, "cpu", experts=args.mixture is not None)
        with pytest.raises(ConfigError, match=why) as refusal:
            build_model(shape.spec, args, config, mesh)
    assert refusal.value.key == key
    assert memory_now() - begin < 100 * 2**20


def memory_now() -> int:
    """The bytes of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("degree", [EP, TP])
def test_experts_of_their_own_mesh_need_a_later_torch(degree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(["--model.name=qwen3_moe", f"--{degree}=2"])
    args = choose_shape(config).flavor.configured(2048, 64)
    with lone_process_group(0, 2):
        mesh = build_mesh(resolve_degrees(config.parallelism, 2), "cpu", experts=True)
        check(args, LAYOUT, mesh, config)
        monkeypatch.setattr(torch, "__version__", TorchVersion("2.11.0"))
        with pytest.raises(ConfigError, match=r"needs torch 2\.12 or later with experts") as refusal:
            check(args, LAYOUT, mesh, config)
    assert refusal.value.key == degree


def test_generation_does_not_shard_experts() -> None:
    """It makes no meshes for them."""
    config = load_config(["--model.name=qwen3_moe", f"--{TP}=2"])
    args = choose_shape(config).flavor.configured(2048, 64)
    with lone_process_group(0, 2):
        mesh = build_mesh(resolve_degrees(config.parallelism, 2), "cpu")
        with pytest.raises(ConfigError, match="only training spreads them") as refusal:
            check(args, LAYOUT, mesh, config)
    assert refusal.value.key == TP


@pytest.mark.parametrize(
    ("sizes", "key"),
    [
        ({"n_experts": 3}, "n_experts"),
        ({"experts_per_token": 99}, "experts_per_token"),
        ({"ffn_dim": 64}, "ffn_dim"),  # no block has a dense feed-forward
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], key: str) -> None:
    spec = get_model_spec("qwen3_moe")
    with pytest.raises(ConfigError) as refusal:
        spec.resized(spec.flavor("debugmodel"), sizes)
    assert refusal.value.key == f"model.args.{key}"


def test_flops_are_those_of_the_experts_that_a_token_uses() -> None:
    with torch.device("meta"):
        model = Decoder(get_model_spec("qwen3_moe").flavor("30B-A3B"))
    size = model.size()
    active = size.params - size.unused_params
    assert 3.3e9 < active < 3.4e9  # "A3B"
    linear = flops_per_token(size, 4096) - 12 * 48 * 32 * 128 * 4096
    assert linear == 6 * (active - size.embedding_params)


def test_an_estimate_counts_all_experts_and_the_exchange_of_loads() -> None:
    options = {**TINY, **SMALL}
    config = load_config([f"--{key}={value}" for key, value in options.items()])
    result = estimate(config, 2)
    (rank,) = result.ranks
    experts = 2 * 6 * 3 * 32 * 16 * 4 // 2
    assert experts < rank.parameters < experts + 2048 * 32 * 4 + 60_000
    reduced = [traffic.nbytes for collective, traffic in rank.traffic.items() if collective.name == "all-reduce"]
    # Norm, loss and requests to stop; of each layer its loads, and three sums; the numbers of labels.
    assert sum(reduced) == 4 * 8 + 2 * (6 + 3) * 8 + 2 * 4


def test_an_estimate_counts_the_exchange_of_tokens_and_its_worst_case() -> None:
    options = {**TINY, **SMALL, EP: 2, "model.args.n_layers": 1}
    config = load_config([f"--{key}={value}" for key, value in options.items()])
    result = estimate(config, 4)
    (rank,) = result.ranks
    (traffic,) = (t for collective, t in rank.traffic.items() if collective.dimension == "expert parallel")
    rows = 4 * 32 * 2  # of the tokens of a device, one for each of their experts
    # Rows in bfloat16 and weights in float32, two ways, forward and backward; the loads of 6 experts.
    assert traffic.nbytes == rows * (4 * 32 * 2 + 2 * 4) + 6 * 4
    assert traffic.calls == 7
    assert rank.worst_peak is not None
    assert rank.worst_peak > rank.peak
    assert "its peak is" in " ".join(result.notes)


def test_an_estimate_names_gradients_that_nothing_reduces() -> None:
    """Those of experts that are on one process alone. The peak is in the backward, where most of them are there."""
    options = {**TINY, **SMALL, EP: 2, "model.args.n_layers": 1, "model.args.expert_dim": 256}
    options |= {"training.seq_len": 8, "training.local_batch_size": 1}
    (rank,) = estimate(load_config([f"--{key}={value}" for key, value in options.items()]), 2).ranks
    assert rank.at_peak["gradients"] >= 3 * 3 * 32 * 256 * 4
    assert rank.activations < 8 * 32 * 2 * 4
