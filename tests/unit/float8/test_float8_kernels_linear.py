"""A float8 layer on its kernels' path, which GPUs take: here with the CPU's float8 matmul, and plain operations or
Triton's interpreter for the kernels."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from tests.unit.float8.interpreted import exact_conversions
from titanlite.float8 import Float8LinearConfig, convert_to_float8_training
from titanlite.quant.float8 import format, matmul
from titanlite.quant.float8.format import Kernels
from titanlite.quant.kernels import launch, reference

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu has them on the GPU"),
    pytest.mark.skipif(torch.__version__ < "2.12", reason="the CPU's float8 matmul takes no scales of rows yet"),
]


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """The CPU as a device with float8 units; yields the casts that kernels make."""
    made: list[tuple[Any, ...]] = []

    def cast(x: Tensor, amaxes: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        made.append((tuple(x.shape), *arguments[1:3]))
        return reference.cast_with(x, amaxes, *arguments)

    with torch.library._scoped_library("titanlite_quant", "IMPL") as library:
        library.impl("cast", cast, "CPU", allow_override=True)
        monkeypatch.setattr(format, "must_emulate", lambda device, target, dtypes, emulate, compiled: emulate)
        yield made


def step(config: Float8LinearConfig, tokens: int, **options: Any) -> list[Tensor]:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False)).bfloat16()
    model = convert_to_float8_training(layers, config=dataclasses.replace(config, **options))
    x = torch.randn(tokens, 64, dtype=torch.bfloat16, requires_grad=True)
    out = model(x)
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    return [out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@each_recipe
@pytest.mark.parametrize("tokens", [32, 19])
def test_same_as_plain_operations(recipe: str, tokens: int, native: list[tuple[Any, ...]]) -> None:
    config = Float8LinearConfig.from_recipe_name(recipe)
    results = step(config, tokens)
    assert native
    native.clear()
    expected = step(config, tokens, kernels="inductor")
    assert not native
    assert len(results) == 4
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results, step(config, tokens, emulate=True), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-2)


@each_recipe
def test_in_triton(recipe: str) -> None:
    config = Float8LinearConfig.from_recipe_name(recipe)
    expected = step(config, 16)
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library, exact_conversions():
        library.impl("amaxes", launch.amaxes, "CPU", allow_override=True)
        library.impl("cast", launch.cast_with, "CPU", allow_override=True)
        library.impl("rescale", launch.rescale, "CPU", allow_override=True)
        for a, b in zip(step(config, 16), expected, strict=True):
            assert torch.equal(a, b)


def test_what_is_cast_how_often(native: list[tuple[Any, ...]]) -> None:
    tensor, vector, none = "tensor", "vector", "none"
    step(Float8LinearConfig(), 32)
    assert native == [
        ((32, 64), tensor, tensor),  # input, once for both its matmuls
        ((48, 64), tensor, none),  # weight
        ((32, 48), tensor, tensor),
        ((32, 48), tensor, none),
        ((32, 32), tensor, tensor),  # gradient, once for both its matmuls
        ((32, 48), none, tensor),  # weight, transposed
        ((32, 48), tensor, tensor),
        ((48, 64), none, tensor),
    ]
    native.clear()
    step(Float8LinearConfig.from_recipe_name("rowwise"), 32)
    assert {(by_rows, by_columns) for _, by_rows, by_columns in native} == {
        (vector, vector),
        (vector, none),
        (none, vector),
    }
    assert len(native) == 8
    native.clear()
    step(Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"), 32)
    assert {(by_rows, by_columns) for _, by_rows, by_columns in native} == {(vector, none), (none, tensor)}


def test_the_weight_is_cast_once_per_step(native: list[tuple[Any, ...]]) -> None:
    layer = nn.Linear(32, 16, bias=False).bfloat16()
    model = convert_to_float8_training(nn.Sequential(layer))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for weights in (4, 2):  # each layout; twice in the first step, in which it turns out that a copy is worth keeping
        for _ in range(3):
            x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
            model(x).sum().backward()
        assert [shape for shape, *_ in native].count((16, 32)) == weights + 3  # the inputs
        native.clear()
        optimizer.step()
        optimizer.zero_grad()


@each_recipe
def test_no_operand_is_copied_into_another_layout(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels write what float8 units read."""
    padded = matmul._padded

    def checked(a: Tensor) -> Tensor:
        assert a.is_contiguous()
        return padded(a)

    monkeypatch.setattr(matmul, "_padded", checked)
    step(Float8LinearConfig.from_recipe_name(recipe), 32)


def test_delayed_scales_are_not_for_the_kernels(native: list[tuple[Any, ...]]) -> None:
    from titanlite.float8 import CastConfig, ScalingType

    delayed = CastConfig(scaling_type=ScalingType.DELAYED)
    step(Float8LinearConfig(cast_config_input=delayed, cast_config_input_for_grad_weight=delayed), 32)
    assert (32, 64) not in {shape for shape, *_ in native}


@pytest.mark.parametrize("kernels", ["triton", "auto"])
@each_recipe
def test_compiled(recipe: str, kernels: Kernels, native: list[tuple[Any, ...]]) -> None:
    """By default the kernels cast in eager code, and in compiled code where the compiler's casts would move more."""
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), kernels=kernels)
    by_compiler = kernels == "auto" and recipe == "tensorwise"
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = convert_to_float8_training(nn.Sequential(nn.Linear(64, 48, bias=False)).bfloat16(), config=config)
    compiled = torch.compile(copy.deepcopy(eager), fullgraph=True, backend="aot_eager")
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    native.clear()
    results = []
    for model in (eager, compiled):
        y = x.clone().requires_grad_()
        out = model(y)
        out.backward(torch.ones_like(out))
        results.append((out, y.grad))
        assert bool(native) == (model is eager or not by_compiler)
        native.clear()
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kernels", ["triton", "inductor"])
@each_recipe
def test_what_a_compiled_layer_keeps_for_backward(recipe: str, kernels: Kernels) -> None:
    """Inputs in float8, or in bf16 where the recipe multiplies that; weights as they are: their transposed copy is made
    in backward, not kept from forward at a byte per parameter."""
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 32, bias=False)).bfloat16()
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), kernels=kernels)
    converted = convert_to_float8_training(model, config=config)
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager_decomp_partition")  # inductor's partitions
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        compiled(torch.randn(16, 64, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    dtype = torch.bfloat16 if recipe == "rowwise_with_gw_hp" else torch.float8_e4m3fn
    shapes_and_dtypes = [(tuple(t.shape), t.dtype) for t in kept if min(t.shape, default=1) > 1]
    inputs = [((16, 64), dtype), ((16, 48), dtype)]
    assert sorted(shapes_and_dtypes, key=str) == sorted(
        [*inputs, *((tuple(p.shape), p.dtype) for p in model.parameters())], key=str
    )


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = (nn.Linear(*size, bias=False) for size in ((64, 96), (64, 96), (96, 64)))

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(torch.tanh(self.w1(x)) * self.w3(x))


def test_compiled_layers_share_the_cast_of_their_input(native: list[tuple[Any, ...]]) -> None:
    torch.compiler.reset()
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), kernels="triton")
    compiled = torch.compile(convert_to_float8_training(FeedForward().bfloat16(), config=config), fullgraph=True)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    for _ in range(2):  # the first run compiles
        native.clear()
        compiled(x)
    inputs, weights = ("vector", "vector"), ("vector", "none")
    expected = [(32, 64, *inputs), (32, 96, *inputs), (64, 96, *weights), (96, 64, *weights), (96, 64, *weights)]
    assert sorted((*shape, *scales) for shape, *scales in native) == expected
