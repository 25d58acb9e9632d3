"""Adam with moments in bfloat16 and float8: updates are those of float32 but for the rounding, which is unbiased."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.forks import on_ranks
from titanlite.config import check_config, load_config
from titanlite.config.schema import Optimizer
from titanlite.errors import ConfigError
from titanlite.optim import build_optimizer, update_parameters
from titanlite.optim.moments import BLOCK, from_blocks, noise, round_to_bfloat16, round_to_e4m3, to_blocks

MOMENTS = ("bfloat16", "float8_e4m3fn")
DRAWS = 1_000_000


def draws(key: int, count: int = DRAWS) -> Tensor:
    return noise(torch.tensor(key, dtype=torch.int32), (0,), (count,), (count,))[0]


def gradient(step: int, shape: tuple[int, ...] = (32, 2 * BLOCK)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(step)) * 10.0 ** (step % 3)


def trained(moments: str, steps: int, implementation: str = "for-loop", name: str = "AdamW", **options: Any) -> Any:
    param = nn.Parameter(gradient(1000))
    settings = Optimizer(name, lr=1e-2, implementation=implementation, moments=moments, **options)  # type: ignore[arg-type]
    optimizer = build_optimizer([("weight", param)], settings, seed=7)
    for step in range(steps):
        param.grad = gradient(step)
        update_parameters(optimizer, torch.tensor(2.0))
    return param.detach(), optimizer


@pytest.mark.parametrize("value", [1.0, 1.001, -3.3, 1e-30, 2.0**-126, 5e-39, 0.0171, 448.0, 0.0029, -0.001, 0.0])
@pytest.mark.parametrize("rounding", [round_to_bfloat16, round_to_e4m3])
def test_rounding_is_to_a_neighbour_and_unbiased(rounding: Any, value: float) -> None:
    dtype = torch.bfloat16 if rounding is round_to_bfloat16 else torch.float8_e4m3fn
    x = torch.full((DRAWS,), value)
    rounded = rounding(x, draws(3)).double()
    neighbours = rounded.unique()
    assert len(neighbours) <= 2
    exact = float(torch.tensor(value, dtype=torch.float32).double())
    if exact == float(torch.tensor(value).to(dtype)):
        assert neighbours.tolist() == [exact]
    # A draw has 16 bits: what is nearer to a neighbour than 2^-16 of the distance may always become that neighbour.
    distance = float((neighbours.max() - neighbours.min()).clamp(min=2.0**-9 if dtype != torch.bfloat16 else 0))
    assert neighbours.min() - distance * 2**-16 <= exact <= neighbours.max() + distance * 2**-16
    error = (rounded.mean() - exact).abs()
    assert error <= 3 * rounded.std() / DRAWS**0.5 + distance * 2**-16


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), torch.finfo(torch.float32).max])
    rounded = round_to_bfloat16(x, torch.full((4,), 0xFFFF, dtype=torch.int32))
    assert rounded.isnan().tolist() == [True, False, False, False]
    assert rounded[1:].tolist() == [float("inf"), -float("inf"), float("inf")]
    data, scale = to_blocks(
        x[:1].expand(1, BLOCK).contiguous(), torch.zeros(1, BLOCK, dtype=torch.int32), keep_positive=True
    )
    assert from_blocks(data, scale).isnan().all()


def test_noise_is_uniform_and_independent() -> None:
    """Over places, keys, and the two numbers of a place: correlations of 10^6 draws are within 4 standard errors."""
    size = (1000, 1000)
    first, second = noise(torch.tensor(1, dtype=torch.int32), (0, 0), size, size)
    others = [noise(torch.tensor(key, dtype=torch.int32), (0, 0), size, size)[0] for key in (2, 1 << 16, -1)]
    assert (first.min(), first.max()) == (0, 0xFFFF)
    counts = torch.bincount(first.flatten() >> 8, minlength=256).double()
    assert ((counts - DRAWS / 256).square() / (DRAWS / 256)).sum() < 256 + 4 * (2 * 256) ** 0.5
    pairs = [(first, x) for x in (second, *others, first.roll(1, 0), first.roll(1, 1))]
    for a, b in pairs:
        assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1].abs() < 4 / DRAWS**0.5


def test_noise_depends_on_the_place_in_the_whole_tensor_alone() -> None:
    key, whole = torch.tensor(5, dtype=torch.int32), (8, 6, 4)
    complete = noise(key, (0, 0, 0), whole, whole)
    shard = noise(key, (2, 3, 1), (4, 2, 3), whole)
    for a, b in zip(complete, shard, strict=True):
        assert torch.equal(a[2:6, 3:5, 1:4], b)


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
@pytest.mark.parametrize("moments", MOMENTS)
def test_updates_are_those_of_float32_but_for_the_rounding(moments: str, name: str) -> None:
    expected, reference = trained("float32", 8, name=name)
    actual, optimizer = trained(moments, 8, name=name)
    start, _ = trained("float32", 0)
    error = (actual - expected).norm() / (expected - start).norm()
    assert 0 < error < {"bfloat16": 0.01, "float8_e4m3fn": 0.1}[moments]
    state, exact = optimizer.state_dict()["state"][0], reference.state_dict()["state"][0]
    dtype = torch.bfloat16 if moments == "bfloat16" else torch.float8_e4m3fn
    assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == dtype
    assert state["step"] == exact["step"] == 8


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_vector_in_float8_keeps_float32(moments: str) -> None:
    param = nn.Parameter(torch.ones(BLOCK))
    optimizer = build_optimizer([("norm", param)], Optimizer(implementation="for-loop", moments=moments))  # type: ignore[arg-type]
    param.grad = torch.ones(BLOCK)
    optimizer.step()
    assert optimizer.state[param]["exp_avg"].dtype == (torch.bfloat16 if moments == "bfloat16" else torch.float32)


@pytest.mark.parametrize("moments", MOMENTS)
def test_small_changes_add_up(moments: str) -> None:
    """A second moment that rises by a thousandth of its distance in each step, less than half a quantum."""
    param = nn.Parameter(torch.zeros(64, 64))
    options = Optimizer(beta2=0.999, lr=1e-6, implementation="for-loop", moments=moments)  # type: ignore[arg-type]
    optimizer = build_optimizer([("weight", param)], options)
    for value, steps in ((1.0, 1), (2.0, 200)):
        for _ in range(steps):
            param.grad = torch.full_like(param, value)
            optimizer.step()
    state = optimizer.state[param]
    second = state["exp_avg_sq"].float()
    if moments == "float8_e4m3fn":
        second = from_blocks(state["exp_avg_sq"], state["exp_avg_sq_scale"]).square()
    exact = 4 - (4 - 0.001) * 0.999**200
    assert second.mean() == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_skipped_step_changes_no_bit(moments: str) -> None:
    _, optimizer = trained(moments, 3)
    weight = optimizer.param_groups[0]["params"][0]
    before = [x.clone().view(torch.uint8) for x in (weight.detach(), *list(optimizer.state[weight].values())[1:])]
    weight.grad = torch.full_like(weight, float("nan"))
    update_parameters(optimizer, torch.tensor(1.0), skip=torch.tensor(1.0))
    after = [x.view(torch.uint8) for x in (weight.detach(), *list(optimizer.state[weight].values())[1:])]
    assert all(map(torch.equal, before, after))
    assert optimizer.state[weight]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("moments", MOMENTS)
def test_the_compiled_update_is_the_plain_one(moments: str) -> None:
    compiled, optimizer = trained(moments, 3, "fused")
    plain, reference = trained(moments, 3)
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    states = [o.state_dict()["state"][0] for o in (optimizer, reference)]
    for key in states[0]:
        a, b = states[0][key].float(), states[1][key].float()
        if key.endswith("_scale"):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
        else:  # another order of additions may carry a number over the noise to the other neighbour, but rarely
            assert (a != b).double().mean() < 0.01


def shards(moments: str) -> list[list[float]]:
    """The whole weight after three steps, with its rows over two ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    param = nn.Parameter(distribute_tensor(gradient(1000), mesh, [Shard(0)]))
    options = Optimizer(lr=1e-2, implementation="for-loop", moments=moments)  # type: ignore[arg-type]
    optimizer = build_optimizer([("weight", param)], options, seed=7)
    for step in range(3):
        param.grad = distribute_tensor(gradient(step), mesh, [Shard(0)])
        update_parameters(optimizer, torch.tensor(2.0))
    whole: list[list[float]] = param.detach().full_tensor().tolist()  # type: ignore[attr-defined]
    dist.destroy_process_group()
    return whole


@pytest.mark.parametrize("moments", MOMENTS)
def test_shards_are_updated_as_the_whole(moments: str, tmp_path: Path) -> None:
    whole, _ = trained(moments, 3)
    for result in on_ranks(2, tmp_path / "ranks", {}, shards, moments):
        assert torch.equal(torch.tensor(result), whole)


@pytest.mark.parametrize("option", ["--optimizer.implementation=foreach", "--optimizer.name=SGD"])
def test_what_has_no_low_precision_is_refused(option: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(load_config(["--optimizer.moments=float8_e4m3fn", option]), 1, train=False)
    assert error.value.key == "optimizer.moments"
