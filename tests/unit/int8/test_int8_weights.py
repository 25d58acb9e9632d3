"""Weights stored in int8: the layer against torchao's int8_weight_only_quantized_training, and the rounding."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.forks import on_ranks
from tests.unit.float8.test_float8_oracle import KINDS, SHAPES, sqnr, step, values
from titanlite.config import check_config, load_config
from titanlite.config.schema import Optimizer
from titanlite.errors import ConfigError
from titanlite.optim import build_optimizer, update_parameters
from titanlite.quant.int8.numerics import LARGEST, amax_of, amax_to_scale, dequantize, stochastically_rounded
from titanlite.quant.int8.weights import Int8Weights
from titanlite.quant.linear import QuantLinear
from titanlite.quant.stored import StoredWeight, stored_parts, stored_weight
from titanlite.quant.streams import random_bits, rounding_key
from titanlite.quant.tensor import QuantTensor

torchao = pytest.importorskip("torchao.prototype.quantized_training.int8")

IN, OUT, DRAWS = 64, 96, 1_000_000
FORMAT = Int8Weights()


def layer_of(linear: nn.Linear) -> QuantLinear:
    """The layer with its weight as FSDP2 gathers it on one process."""
    layer = QuantLinear.from_linear(copy.deepcopy(linear), FORMAT, gather_quantized=True)
    stored = stored_weight(layer.weight)
    assert stored is not None
    layer.weight = nn.Parameter(QuantTensor(stored.qdata, stored.scale, linear.weight.dtype))
    return layer


# ---- the layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("shape", "bias"), [(SHAPES[0], False), (SHAPES[1], True), (SHAPES[2], False), ((7,), True)])
def test_the_layer_is_torchaos(kind: str, shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(IN, OUT, bias=bias)
    theirs = copy.deepcopy(linear)
    theirs.weight = nn.Parameter(torchao.Int8QuantizedTrainingLinearWeight.from_float(linear.weight))
    ours = layer_of(linear)
    assert torch.equal(ours.weight.qdata, theirs.weight.int_data)  # type: ignore[attr-defined]
    assert torch.equal(ours.weight.scale.flatten(), theirs.weight.scale)  # type: ignore[attr-defined]
    x, grad = values(kind, *shape, IN), values("random", *shape, OUT)
    expected, result = step(nn.Sequential(theirs), x, grad), step(nn.Sequential(ours), x, grad)
    assert expected.keys() == result.keys()
    for name in expected:
        assert sqnr(expected[name], result[name]) > 110, name  # float32 multiplies in another order


def test_bfloat16_is_close_to_float64_of_the_same_weights() -> None:
    linear = nn.Linear(IN, OUT, bias=False)
    layer = layer_of(linear)
    exact = copy.deepcopy(linear).double()
    exact.weight.data = dequantize(layer.weight.qdata, layer.weight.scale).double()  # type: ignore[attr-defined]
    x, grad = values("random", 48, IN), values("random", 48, OUT)
    expected = step(nn.Sequential(exact), x.bfloat16().double(), grad.bfloat16().double())
    layer.weight = nn.Parameter(QuantTensor(layer.weight.qdata, layer.weight.scale, torch.bfloat16))  # type: ignore[attr-defined]
    for name, value in step(nn.Sequential(layer), x.bfloat16(), grad.bfloat16()).items():
        assert sqnr(expected[name], value) > 40, name


def test_the_layer_does_not_compute_before_fsdp2_has_gathered() -> None:
    with pytest.raises(RuntimeError, match="FSDP2 has not gathered"):
        QuantLinear.from_linear(nn.Linear(IN, OUT), FORMAT, gather_quantized=True)(torch.zeros(1, IN))


# ---- the stored weight


def stored(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(StoredWeight.of(weight, FORMAT))


def test_what_it_is_not_made_for_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="dequantize it first"):
        stored(torch.ones(8, 8)).detach() * 2


def test_a_state_dict_is_plain_and_loads() -> None:
    model = nn.Sequential(QuantLinear.from_linear(nn.Linear(IN, OUT), FORMAT, gather_quantized=True))
    state = model.state_dict()
    assert {name: (type(t), t.dtype) for name, t in state.items()} == {
        "0.weight": (Tensor, torch.int8),
        "0.weight_scale": (Tensor, torch.float32),
        "0.bias": (Tensor, torch.float32),
    }
    other = nn.Sequential(QuantLinear.from_linear(nn.Linear(IN, OUT), FORMAT, gather_quantized=True))
    other.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), state.values(), strict=True))
    linear = nn.Linear(IN, OUT)
    other.load_state_dict({f"0.{name}": value for name, value in linear.state_dict().items()})  # is quantized
    weight = stored_weight(other[0].weight)
    assert weight is not None
    assert torch.equal(weight.qdata, StoredWeight.of(linear.weight, FORMAT).qdata)


# ---- rounding


def bits(key: int, shape: tuple[int, ...] = (1, DRAWS)) -> Tensor:
    return random_bits(torch.tensor(key, dtype=torch.int32), [0] * len(shape), shape, shape)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 0.5, -0.5, 1e-3, -3.3, 126.9, -127.0, 99.999, 1e-7])
def test_rounding_is_to_a_neighbour_and_unbiased(value: float) -> None:
    """In units of the scale, over 10^6 draws: within 3 standard errors."""
    scale = torch.tensor([[0.0371]])
    x = torch.full((1, DRAWS), value) * scale
    data, kept = stochastically_rounded(x, scale * LARGEST, scale, bits(5))
    assert torch.equal(kept, scale)
    assert {math.floor(value), math.ceil(value)} >= {*data.unique().tolist()}
    error = (data.double().mean() - x[0, 0].double() / scale.double()).abs()
    assert error <= 3 * data.double().std() / DRAWS**0.5 + 2e-5  # and the float32 rounding of value * scale


def test_rows_take_a_new_scale_only_where_they_must() -> None:
    scale = torch.full((4, 1), 0.5)
    x = torch.zeros(4, 8)
    x[:, 0] = torch.tensor([63.5, 64.0, 31.0, math.nan])  # fits; outgrew 127 * 0.5; fell below half of it
    amax = amax_of(x, 1)
    data, new = stochastically_rounded(x, amax, scale, bits(1, (4, 8)))
    assert new[0] == scale[0]
    assert torch.equal(new[1:3], amax_to_scale(amax[1:3] * 17 / 16))
    assert new[3].isnan()
    assert data[0, 0] == LARGEST
    assert (data[1:3, 0] - 119.5).abs().max() <= 0.5
    now = dequantize(data, new)[:3]
    again, kept = stochastically_rounded(now, amax_of(now, 1), new[:3], bits(2, (3, 8)))
    assert torch.equal(kept, new[:3])  # what has not changed keeps its scale, and its bytes
    assert torch.equal(again, data[:3])


def test_draws_are_independent_over_steps_parameters_and_shards() -> None:
    keys = [
        rounding_key(0, "a weight"),
        rounding_key(0, "a weight") + 1,
        rounding_key(0, "b weight"),
        rounding_key(1, "a weight"),
    ]
    draws = [(bits(key) >> 8 & 0xFFFFFF).double().flatten() for key in keys]
    draws.append(draws[0].roll(1))
    correlation = torch.corrcoef(torch.stack(draws)).fill_diagonal_(0)
    assert correlation.abs().max() < 4 / DRAWS**0.5
    whole = bits(3, (8, 6))
    assert torch.equal(whole[4:], random_bits(torch.tensor(3, dtype=torch.int32), (4, 0), (4, 6), (8, 6)))


# ---- optimizers

OPTIMIZERS = [("AdamW", "float32"), ("Adam", "bfloat16"), ("AdamW", "float8_e4m3fn"), ("SGD", "float32")]


def gradient(seed: int, shape: tuple[int, ...] = (32, 128)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trained(name: str, moments: str, steps: int, implementation: str = "for-loop", seed: int = 7) -> Any:
    param = stored(gradient(1000))
    options = Optimizer(name, lr=1e-3, implementation=implementation, moments=moments)  # type: ignore[arg-type]
    optimizer = build_optimizer([("weight", param)], options, seed=seed)
    for number in range(steps):
        param.grad = gradient(number)
        update_parameters(optimizer, torch.tensor(2.0))
    return param, optimizer


def values_of(param: Tensor) -> Tensor:
    weight = stored_weight(param)
    assert weight is not None
    return weight.dequantized()


@pytest.mark.parametrize(("name", "moments"), OPTIMIZERS)
def test_updates_are_those_of_high_precision_on_average(name: str, moments: str) -> None:
    """Each step changes a weight by a thirtieth of a quantum or less: rounded to nearest, nothing would move."""
    stays, _ = trained(name, moments, 0)
    start = values_of(stays)
    reference = nn.Parameter(start.clone())
    options = Optimizer(name, lr=1e-3, implementation="for-loop")  # type: ignore[arg-type]
    optimizer = build_optimizer([("weight", reference)], options)
    for _ in range(20):
        reference.grad = gradient(0)  # the same: changes add up
        update_parameters(optimizer, torch.tensor(2.0))
    changes = []
    for seed in range(8):
        param = stored(gradient(1000))
        optimizer = build_optimizer(
            [("weight", param)],
            Optimizer(name, lr=1e-3, implementation="for-loop", moments=moments),
            seed=seed,  # type: ignore[arg-type]
        )
        for _ in range(20):
            param.grad = gradient(0)
            update_parameters(optimizer, torch.tensor(2.0))
        changes.append(values_of(param) - start)
    expected = reference.detach() - start
    mean = torch.stack(changes).mean(0)
    scale = stored_weight(stays).scale  # type: ignore[union-attr]
    assert (expected / 20 / scale).abs().max() < 0.5
    slope = (mean * expected).sum() / expected.square().sum()
    noise = torch.stack(changes).std(0).square().sum().sqrt() / 8**0.5 / expected.norm()
    assert slope == pytest.approx(1, abs=3 * float(noise) / 8)
    assert float(noise) > 0


@pytest.mark.parametrize(("name", "moments"), OPTIMIZERS)
def test_a_run_is_reproduced_and_another_seed_is_another(name: str, moments: str) -> None:
    first, again, other = (trained(name, moments, 5, seed=seed)[0] for seed in (7, 7, 8))
    assert all(map(torch.equal, stored_parts(first), stored_parts(again)))
    assert not torch.equal(stored_parts(first)[0], stored_parts(other)[0])


@pytest.mark.parametrize(("name", "moments"), OPTIMIZERS)
def test_a_skipped_step_changes_no_bit(name: str, moments: str) -> None:
    param, optimizer = trained(name, moments, 3)
    tensors = [*stored_parts(param), *optimizer.state[param].values()]
    before = [x.clone().view(torch.uint8) if x.dim() else x.clone() for x in tensors]
    param.grad = torch.full(param.shape, float("nan"))
    update_parameters(optimizer, torch.tensor(1.0), skip=torch.tensor(1.0))
    after = [x.view(torch.uint8) if x.dim() else x for x in tensors]
    assert all(map(torch.equal, before, after))


@pytest.mark.slow
@pytest.mark.parametrize(  # what formats of moments compile to is test_low_precision's
    ("name", "moments"), [pytest.param(*o, marks=[] if o[1] == "bfloat16" else pytest.mark.long) for o in OPTIMIZERS]
)
def test_the_compiled_update_is_the_plain_one(name: str, moments: str) -> None:
    (compiled, _), (plain, _) = trained(name, moments, 3, "fused"), trained(name, moments, 3)
    (a, a_scale), (b, b_scale) = stored_parts(compiled), stored_parts(plain)
    torch.testing.assert_close(a_scale, b_scale, rtol=1e-6, atol=0)
    # Another order of additions may carry a number over the draw to the other neighbour, but rarely.
    assert (a != b).double().mean() < 0.01


def shards(dim: int) -> list[Any]:
    """The whole weight after three steps, with its rows, or parts of its rows, on two ranks."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole = distribute_tensor(gradient(1000), mesh, [Shard(dim)])
    local = StoredWeight.of(whole.to_local(), FORMAT, mesh if dim == 1 else None)
    param = nn.Parameter(DTensor.from_local(local, mesh, [Shard(dim)], shape=whole.shape, stride=whole.stride()))
    options = Optimizer("AdamW", lr=1e-3, implementation="for-loop")
    optimizer = build_optimizer([("weight", param)], options, seed=7)
    for number in range(3):
        param.grad = distribute_tensor(gradient(number), mesh, [Shard(dim)])
        update_parameters(optimizer, torch.tensor(2.0))
    result = [part.full_tensor().tolist() for part in stored_parts(param)]  # type: ignore[attr-defined]
    dist.destroy_process_group()
    return result


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_are_updated_as_the_whole(dim: int, tmp_path: Path) -> None:
    whole, _ = trained("AdamW", "float32", 3)
    for data, scale in on_ranks(2, tmp_path / "ranks", {}, shards, dim):
        assert torch.equal(torch.tensor(data, dtype=torch.int8), stored_parts(whole)[0])
        assert torch.equal(torch.tensor(scale), stored_parts(whole)[1])


# ---- options

RECIPE = ["--model.converters=int8", "--int8.recipe_name=weights"]


@pytest.mark.parametrize(
    ("option", "key"),
    [
        ("--optimizer.implementation=foreach", "optimizer.implementation"),
        ("--optimizer.name=Muon", "optimizer.name"),
        ("--int8.emulate", "int8.emulate"),
        ("--training.enable_cpu_offload", "training.enable_cpu_offload"),
    ],
)
def test_what_cannot_work_is_refused(option: str, key: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(load_config([*RECIPE, option]), 1, train=False)
    assert error.value.key == key
