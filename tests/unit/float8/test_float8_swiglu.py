"""A layer that takes SwiGLU's product cast as it is computed, with the CPU's float8 matmul."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE
from tests.unit.float8.test_float8_swiglu_kernels import inputs
from titanlite.distributed.activation_checkpoint import _op_contexts
from titanlite.float8 import (
    CastConfig,
    Float8LinearConfig,
    ScalingType,
    convert_to_float8_training,
    high_precision,
    swiglu_linear,
)
from titanlite.float8.inference import calibrate
from titanlite.quant import autograd
from titanlite.quant.float8 import format
from titanlite.quant.kernels import launch, reference

E4M3 = torch.float8_e4m3fn
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
on_cpu = pytest.mark.skipif(
    DEVICE == "cuda" or torch.__version__ < "2.12", reason="with the CPU's float8 matmul, with scales of rows"
)


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU as a device with float8 units."""
    monkeypatch.setattr(format, "must_emulate", lambda device, target, dtypes, emulate, compiled: emulate)


class FeedForward(nn.Module):
    def __init__(self, swiglu: Callable[..., Tensor] = swiglu_linear, bias: bool = False) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(64, 96, bias=False) for _ in range(2))
        self.w2, self.swiglu = nn.Linear(96, 48, bias=bias), swiglu

    def forward(self, x: Tensor) -> Tensor:
        return self.swiglu(self.w2, self.w1(x), self.w3(x))


def model(config: Float8LinearConfig, swiglu: Callable[..., Tensor] = swiglu_linear, **kwargs: Any) -> FeedForward:
    torch.manual_seed(0)
    feed_forward = FeedForward(swiglu, **kwargs).bfloat16()
    convert_to_float8_training(feed_forward, config=config)
    return feed_forward


def by_kernels(recipe: str) -> Float8LinearConfig:
    """The recipe with titanlite's kernels in compiled code too."""
    return dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), kernels="triton")


def step(feed_forward: nn.Module, forward: Callable[[Tensor], Tensor] | None = None) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 19, 64, dtype=torch.bfloat16, requires_grad=True)
    out = feed_forward(x) if forward is None else forward(x)
    out.backward(torch.randn_like(out))
    assert x.grad is not None
    return [out.detach(), x.grad, *(p.grad for p in feed_forward.parameters() if p.grad is not None)]


class _Swiglu(torch.autograd.Function):
    """The product as the kernels round it, by plain operations, for a layer that takes it whole."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return reference.swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        of_up, *rows = (t.reshape(-1, t.shape[-1]) for t in (grad.clone(), *ctx.saved_tensors))
        nothing = torch.empty(0, dtype=torch.int32)
        of_gate, *_ = reference.swiglu_backward(of_up, *rows, nothing, E4M3, "none", True)
        return of_gate.view(grad.shape), of_up.view(grad.shape)


def written(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return layer(_Swiglu.apply(gate, up))  # type: ignore[no-any-return]


def in_two_roundings(layer: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return layer(F.silu(gate) * up)  # type: ignore[no-any-return]


@on_cpu
@each_recipe
@pytest.mark.parametrize("bias", [False, True])
def test_same_as_a_product_that_is_written(native: None, recipe: str, bias: bool) -> None:
    config = Float8LinearConfig.from_recipe_name(recipe)
    results, expected = (step(model(config, swiglu, bias=bias)) for swiglu in (swiglu_linear, written))
    assert len(results) == 5 + bias
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(results, step(model(config, in_two_roundings, bias=bias)), strict=True):
        assert (a - b).norm() < 0.03 * b.norm()  # other roundings, in float8 too


@on_cpu
@each_recipe
def test_in_triton(native: None, recipe: str) -> None:
    config = Float8LinearConfig.from_recipe_name(recipe)
    expected = step(model(config))
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library:
        for name in ("amaxes", "swiglu_backward", "rescale"):
            library.impl(name, getattr(launch, name), "CPU", allow_override=True)
        library.impl("cast", launch.cast_with, "CPU", allow_override=True)
        results = step(model(config))
    for a, b in zip(results, expected, strict=True):
        assert (a - b).norm() < 0.01 * b.norm()


@on_cpu
@pytest.mark.parametrize(
    ("recipe", "backend"),
    [
        *((recipe, "aot_eager") for recipe in RECIPES),
        *(pytest.param(r, "inductor", marks=[] if r == "rowwise" else pytest.mark.long) for r in RECIPES),
    ],
)
def test_compiled(native: None, recipe: str, backend: str) -> None:
    feed_forward = model(by_kernels(recipe))
    expected = step(copy.deepcopy(feed_forward))
    compiled = torch.compile(feed_forward, fullgraph=True, backend=backend)
    for a, b in zip(step(feed_forward, compiled), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if backend == "aot_eager" else 0.02, atol=1e-3)


@on_cpu
@each_recipe
@pytest.mark.parametrize("compiled", [False, True])
def test_backward_keeps_the_factors_alone(native: None, recipe: str, compiled: bool) -> None:
    torch.compiler.reset()
    feed_forward = model(by_kernels(recipe))
    forward: Callable[[Tensor], Tensor] = feed_forward
    if compiled:
        forward = torch.compile(feed_forward, fullgraph=True, backend="aot_eager_decomp_partition")
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        step(feed_forward, forward)
    wide = [t for t in {t.untyped_storage().data_ptr(): t for t in kept if t.ndim > 1}.values() if 96 in t.shape]
    factors = [t for t in wide if t.numel() == 2 * 19 * 96]
    assert [t.dtype for t in factors] == [torch.bfloat16] * 2
    assert {t.data_ptr() for t in wide} - {t.data_ptr() for t in factors} == {
        p.data_ptr() for p in feed_forward.parameters()
    }


@on_cpu
@each_recipe
@pytest.mark.parametrize("per_op", [False, True])
def test_checkpointed(native: None, recipe: str, per_op: bool) -> None:
    feed_forward = model(Float8LinearConfig.from_recipe_name(recipe))
    expected = step(copy.deepcopy(feed_forward))
    contexts = {"context_fn": _op_contexts} if per_op else {}
    forward = partial(checkpoint, feed_forward, use_reentrant=False, **contexts)
    for a, b in zip(step(feed_forward, forward), expected, strict=True):
        assert torch.equal(a, b)


@on_cpu
@each_recipe
def test_compiled_and_checkpointed_per_operation_nothing_of_it_is_computed_again(native: None, recipe: str) -> None:
    torch.compiler.reset()
    feed_forward = model(by_kernels(recipe))
    made: list[str] = []

    def counted(name: str, way: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name == "swiglu_backward" or isinstance(args[-1], Tensor):
                made.append(name)
            return way(*args)

        return call

    ways = {"amaxes": reference.amaxes, "cast": reference.cast_with, "swiglu_backward": reference.swiglu_backward}
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library:
        for name, way in ways.items():
            library.impl(name, counted(name, way), "CPU", allow_override=True)
        forward = partial(checkpoint, feed_forward, use_reentrant=False, context_fn=_op_contexts)
        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager_decomp_partition")  # inductor's partitions
        step(feed_forward, compiled)
        made.clear()
        step(feed_forward, compiled)
    amaxes = {"tensorwise": 1, "rowwise": 2, "rowwise_with_gw_hp": 1}[recipe]  # of rows alone, the cast finds them
    assert sorted(made) == ["amaxes"] * amaxes + ["cast", "swiglu_backward"]


@on_cpu
@pytest.mark.parametrize("frozen", ["weight", "factors", "all but the gate"])
def test_what_needs_no_gradient(native: None, frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = model(Float8LinearConfig.from_recipe_name("rowwise")).w2
    _, gate, up = inputs(32, 96)
    gate.requires_grad_(frozen != "factors")
    up.requires_grad_(frozen == "weight")
    layer.weight.requires_grad_(frozen == "factors")
    with monkeypatch.context() as without:
        if frozen == "factors":
            without.delattr(autograd, "_grad_input")  # one matmul less
        swiglu_linear(layer, gate, up).sum().backward()
    gradients = [gate.grad, up.grad, layer.weight.grad]
    assert [g is not None for g in gradients] == [gate.requires_grad, up.requires_grad, layer.weight.requires_grad]
    all_of_them = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    layer.weight.grad = None
    layer.weight.requires_grad_()
    swiglu_linear(layer, *all_of_them).sum().backward()
    for a, b in zip(gradients, [*(t.grad for t in all_of_them), layer.weight.grad], strict=True):
        assert a is None or (b is not None and torch.equal(a, b))


DELAYED = CastConfig(scaling_type=ScalingType.DELAYED)
WHOLE = {
    "emulated": Float8LinearConfig(emulate=True),
    "plain operations": Float8LinearConfig(kernels="inductor"),
    "delayed": Float8LinearConfig(cast_config_input=DELAYED, cast_config_input_for_grad_weight=DELAYED),
}


@on_cpu
@pytest.mark.parametrize("why", WHOLE)
def test_otherwise_the_product_is_an_input_like_any(native: None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(autograd.QuantSwiGLUMatmul, "forward")
    config = WHOLE[why]
    for a, b in zip(step(model(config)), step(model(config, in_two_roundings)), strict=True):
        assert torch.equal(a, b)


@on_cpu
def test_other_factors_than_two_alike(native: None) -> None:
    layer = model(Float8LinearConfig()).w2
    _, gate, up = inputs(16, 96)
    for factors in ((gate.float(), up), (gate[:1], up), (up, up)):
        assert torch.equal(swiglu_linear(layer, *factors), layer(F.silu(factors[0]) * factors[1]))


@on_cpu
def test_autocast(native: None) -> None:
    layer = model(Float8LinearConfig()).w2
    _, gate, up = inputs(16, 96)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(swiglu_linear(layer, gate.float(), up.float()), swiglu_linear(layer, gate, up))


def test_other_layers() -> None:
    feed_forward = model(Float8LinearConfig(emulate=True))
    _, gate, up = inputs(16, 96)
    plain = nn.Linear(96, 48, bias=False).bfloat16()
    plain.load_state_dict(feed_forward.w2.state_dict())
    expected = plain(F.silu(gate) * up)
    assert torch.equal(swiglu_linear(plain, gate, up), expected)
    with high_precision(feed_forward):
        assert torch.equal(swiglu_linear(feed_forward.w2, gate, up), expected)


WATCHED: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0] * 1,)),
    "backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "replaced forward": lambda layer: setattr(layer, "forward", layer.forward),
    "compiled by itself": lambda layer: layer.compile(backend="eager"),
}


@on_cpu
@pytest.mark.parametrize("watcher", WATCHED)
def test_who_watches_the_layer_sees_the_product(native: None, watcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(autograd.QuantSwiGLUMatmul, "forward")
    config = Float8LinearConfig.from_recipe_name("rowwise")
    watched, expected = model(config), model(config, in_two_roundings)
    WATCHED[watcher](watched.w2)
    for a, b in zip(step(watched), step(expected), strict=True):
        assert torch.equal(a, b)


@on_cpu
def test_calibration_sees_the_product(native: None) -> None:
    feed_forward = model(Float8LinearConfig())
    x = torch.randn(16, 64, dtype=torch.bfloat16)
    with torch.no_grad(), calibrate(feed_forward) as amaxes:
        feed_forward(x)
    with torch.no_grad():
        product = F.silu(feed_forward.w1(x)) * feed_forward.w3(x)
    assert amaxes["w2"] == product.abs().max()


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes_and_changing_numbers_of_tokens(native: None, dtype: torch.dtype) -> None:
    layer = model(by_kernels("tensorwise")).w2.to(dtype)
    compiled = torch.compile(swiglu_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (16, 24, 7):
        _, gate, up = inputs(tokens, 96)
        whole = layer(reference.swiglu(gate.to(dtype), up.to(dtype)))
        for way in (swiglu_linear, compiled):
            assert torch.equal(way(layer, gate.to(dtype), up.to(dtype)), whole)
