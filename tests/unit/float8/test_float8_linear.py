"""Float8Linear as a layer: conversion, what it saves, what it reuses, its state, compilation, bad input."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import math
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from tests.support.runs import ROOT
from titanlite.config.schema import ActivationCheckpoint
from titanlite.distributed.activation_checkpoint import _op_contexts, apply_activation_checkpoint
from titanlite.distributed.init import WeightInit
from titanlite.float8 import (
    CastConfig,
    DelayedScalingConfig,
    Float8Linear,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
    convert_to_float8_training,
    precompute_float8_dynamic_scale_for_fsdp,
    share_casts,
    sync_float8_amax_and_scale_history,
    why_not_convertible,
)
from titanlite.models.layers import Attention, Decoder, DecoderArgs, FeedForward, rope_table
from titanlite.quant import kernels
from titanlite.quant.float8 import devices, format
from titanlite.quant.float8.matmul import cast
from titanlite.quant.fsdp import ShardedWeight
from titanlite.quant.tensor import QuantTensor

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)
ARGS = DecoderArgs(dim=128, n_layers=2, n_heads=4, n_kv_heads=2, ffn_dim=256, vocab_size=256, max_seq_len=64)


def configured(recipe: str, **changes: Any) -> Float8LinearConfig:
    return dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), **changes)


def scaled_by(kind: ScalingType, **static: float) -> Float8LinearConfig:
    return Float8LinearConfig(
        **{
            f"cast_config_{name}": CastConfig(scaling_type=kind, static_scale=static.get(name))
            for name in ("input", "weight", "grad_output")
        }
    )


DELAYED = scaled_by(ScalingType.DELAYED)


def sqnr(reference: Tensor, other: Tensor) -> float:
    noise = (reference.double() - other.double()).norm()
    return math.inf if noise == 0 else (20 * torch.log10(reference.double().norm() / noise)).item()


def small_model(dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32, bias=False)).to(dtype)


def train(
    model: nn.Module, steps: int, after_backward: Callable[[], None] = lambda: None, first: int = 0
) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(first, first + steps):
        x = torch.randn(24, 64, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = model(x).float().square().mean()
        loss.backward()
        after_backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


# ---- conversion


def test_conversion_keeps_everything() -> None:
    model = nn.ModuleDict({"a": nn.Linear(32, 16), "b": nn.Linear(32, 16, bias=False), "odd": nn.Linear(32, 10)})
    model["b"].weight = model["a"].weight  # tied
    model["a"].weight.requires_grad_(False)
    model.eval()
    called = []
    model["a"].register_forward_hook(lambda *_: called.append("forward"))
    model["a"].register_forward_pre_hook(lambda *_: called.append("before"))
    modules, params = dict(model.named_modules()), dict(model.named_parameters())
    assert convert_to_float8_training(model) is model
    assert {name: id(m) for name, m in model.named_modules()} == {name: id(m) for name, m in modules.items()}
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in params.items()}
    assert isinstance(model["a"], Float8Linear)
    assert isinstance(model["b"], Float8Linear)
    assert type(model["odd"]) is nn.Linear
    assert why_not_convertible(model["odd"]) == "features are not multiples of 16"
    assert model["a"].weight is model["b"].weight
    assert not model["a"].weight.requires_grad
    assert not model["a"].training
    assert list(model.state_dict()) == ["a.weight", "a.bias", "b.weight", "odd.weight", "odd.bias"]
    model["a"](torch.randn(4, 32))
    assert called == ["before", "forward"]


def test_conversion_of_the_root_and_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = nn.Linear(32, 16, dtype=torch.bfloat16)
    converted = convert_to_float8_training(layer)
    assert converted is layer
    assert isinstance(converted, Float8Linear)
    assert converted.weight.is_meta
    assert converted.weight.dtype is torch.bfloat16


def test_the_filter_sees_layers_and_names() -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.ReLU()))
    seen = []

    def only_the_inner(module: nn.Module, name: str) -> bool:
        seen.append((type(module), name))
        return name.startswith("1")

    convert_to_float8_training(model, module_filter_fn=only_the_inner)
    assert seen == [(nn.Linear, "0"), (nn.Linear, "1.0")]
    assert [isinstance(m, Float8Linear) for m in (model[0], model[1][0])] == [False, True]
    # A second call may convert what the first left out, in another way.
    convert_to_float8_training(model, module_filter_fn=lambda _, name: name == "0", config=configured("rowwise"))
    assert isinstance(model[0], Float8Linear)
    assert model[0].config.cast_config_input.is_axiswise


def test_a_subclass_with_its_own_forward_is_left_alone() -> None:
    class Adapter(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    adapter = Adapter(32, 32)
    model = nn.Sequential(adapter, nn.Linear(32, 32))
    convert_to_float8_training(model)
    assert type(model[0]) is Adapter
    assert why_not_convertible(adapter) == "is a Adapter with a forward of its own"


def test_there_and_back() -> None:
    model = small_model()
    x = torch.randn(4, 64).bfloat16()
    before = model(x)
    convert_to_float8_training(model, config=DELAYED)
    assert not torch.equal(model(x), before)
    for layer in model:
        if isinstance(layer, Float8Linear):
            assert layer.to_linear() is layer
    assert [type(layer) for layer in model] == [nn.Linear, nn.GELU, nn.Linear]
    assert torch.equal(model(x), before)
    assert list(model.state_dict()) == list(small_model().state_dict())


@each_recipe
def test_copies_and_pickles(recipe: str) -> None:
    model = convert_to_float8_training(small_model(), config=configured(recipe))
    train(model, 2)
    x = torch.randn(4, 64).bfloat16()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), model(x))
        assert train(other, 2) == train(copy.deepcopy(model), 2)


# ---- forward and backward


@each_recipe
@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (7, 64), (2, 3, 64), (2, 0, 64)], ids=str)
def test_any_leading_shape(recipe: str, shape: tuple[int, ...]) -> None:
    model = convert_to_float8_training(small_model(torch.float32), config=configured(recipe))
    x = torch.randn(shape, requires_grad=True)
    out = model(x)
    assert out.shape == (*shape[:-1], 32)
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.isfinite(x.grad).all()


@each_recipe
@pytest.mark.parametrize("frozen", ["weight", "input"])
def test_gradients_that_nobody_wants_are_not_computed(recipe: str, frozen: str) -> None:
    layer = Float8Linear(64, 32, config=configured(recipe))
    layer.weight.requires_grad_(frozen != "weight")
    x = torch.randn(8, 64, requires_grad=frozen != "input")
    layer(x).sum().backward()
    assert (layer.weight.grad is None) == (frozen == "weight")
    assert (x.grad is None) == (frozen == "input")


@each_recipe
def test_autocast(recipe: str) -> None:
    """As bf16 inputs: the output in bf16, the same numbers, gradients in the parameters' own dtype."""
    torch.manual_seed(0)
    layer = Float8Linear(64, 32, config=configured(recipe))
    x = torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        out.float().sum().backward()
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, layer(x.bfloat16()))
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype is torch.float32


@each_recipe
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(recipe: str, bad: float) -> None:
    layer = Float8Linear(64, 32, bias=False, config=configured(recipe))
    x = torch.randn(8, 64)
    x[3, 5] = bad
    rows = layer(x).isnan().all(1)
    assert rows.all() if recipe == "tensorwise" else rows.tolist() == [i == 3 for i in range(8)]


@pytest.fixture
def native_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU taken for a device with float8 units: ``torch._scaled_mm`` has a kernel for it."""
    monkeypatch.setattr(format, "must_emulate", lambda device, target, dtypes, emulate, compiled: emulate)


@each_recipe
@pytest.mark.parametrize("tokens", [(16,), (5,), (3, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("native_cpu")
def test_the_native_path(recipe: str, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    """Layouts, padding and scales as float8 units take them, against emulation."""
    torch.manual_seed(0)
    native = Float8Linear(64, 96, config=configured(recipe)).to(dtype)
    emulated = copy.deepcopy(native)
    Float8Linear.from_float(emulated.to_linear(), configured(recipe, emulate=True))
    x = torch.randn(*tokens, 64).to(dtype)
    grads = []
    for layer in (native, emulated):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype))
        grads.append((out, leaf.grad, layer.weight.grad, layer.bias.grad))
    for result, expected in zip(*grads, strict=True):
        assert result is not None
        assert expected is not None
        assert sqnr(expected, result) > (100 if dtype is torch.float32 else 45)


# ---- what is saved and what is reused


def saved_bytes(run: Callable[[], Any], *known: Tensor) -> int:
    """Bytes that autograd keeps for backward, each storage once, without those of ``known``."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    for t in known:
        storages.pop(t.untyped_storage().data_ptr(), None)
    del kept
    return sum(storages.values())


@each_recipe
def test_inputs_are_saved_in_one_byte(recipe: str) -> None:
    tokens = 512
    layer = nn.Linear(256, 128, bias=False, dtype=torch.bfloat16)
    x = torch.randn(tokens, 256, dtype=torch.bfloat16, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.weight) == 2 * x.numel()
    convert_to_float8_training(layer, config=configured(recipe))
    per_element = saved_bytes(lambda: layer(x), layer.weight) / x.numel()
    if recipe == "rowwise_with_gw_hp":
        assert per_element == 2  # grad_weight is computed in high precision
    else:
        assert 1 <= per_element <= 1.1


@each_recipe
def test_layers_that_share_an_input_save_it_once(recipe: str) -> None:
    torch.manual_seed(0)
    per_element = 2 if recipe == "rowwise_with_gw_hp" else 1.1
    x = share_casts(torch.randn(2, 64, ARGS.dim, dtype=torch.bfloat16, requires_grad=True) * 1)  # as a norm's output
    attention = Attention(ARGS.dim, ARGS.n_heads, ARGS.n_kv_heads, ARGS.head_size).bfloat16()
    trio = (attention.wq, attention.wk, attention.wv)
    convert_to_float8_training(attention, config=configured(recipe))
    weights = [m.weight for m in trio]
    assert saved_bytes(lambda: [m(x) for m in trio], *weights) <= per_element * x.numel()
    feed_forward = convert_to_float8_training(FeedForward(ARGS.dim, ARGS.ffn_dim).bfloat16(), config=configured(recipe))
    pair = (feed_forward.w1, feed_forward.w3)
    assert saved_bytes(lambda: [m(x) for m in pair], *(m.weight for m in pair)) <= per_element * x.numel()  # type: ignore[union-attr, operator]


class Counter:
    """Counts casts, by the storage of what is cast."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.casts: list[int] = []

        def counting(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.casts.append(x.data_ptr())
            return cast(x, *args, **kwargs)

        monkeypatch.setattr(format, "cast", counting)

    def of(self, t: Tensor) -> int:
        return self.casts.count(t.data_ptr())


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


USES = {"tensorwise": 1, "rowwise": 2, "rowwise_with_gw_hp": 2}  # casts of a weight that its matmuls need


@each_recipe
def test_a_shared_input_is_cast_once(recipe: str, counter: Counter) -> None:
    a, b = (Float8Linear(64, 32, config=configured(recipe)) for _ in range(2))
    x = share_casts(torch.randn(16, 64, requires_grad=True) * 1)
    first = a(x), b(x)
    assert counter.of(x) == USES[recipe]
    x.mul_(2)  # another input now
    second = a(x), b(x)
    assert counter.of(x) == 2 * USES[recipe]
    with torch.no_grad():
        a(x)
    assert counter.of(x) == 2 * USES[recipe] + 1  # nothing is kept, and nothing made for a backward
    for one, two in zip(first, second, strict=True):
        assert not torch.equal(one, two)


@each_recipe
def test_an_input_is_shared_only_where_its_block_says_so(recipe: str) -> None:
    """Between the layers of anybody's module, a write that no version counter shows may come."""
    a, b = (Float8Linear(64, 32, config=configured(recipe)) for _ in range(2))
    x = torch.randn(16, 64, requires_grad=True) * 1
    a(x)
    x.data.mul_(3)
    assert torch.equal(b(x), b(x.detach().clone()))


@each_recipe
def test_a_batch_that_is_filled_again_is_never_stale(recipe: str) -> None:
    """Communication, NumPy and ``.data`` write to tensors where no version counter sees it."""
    layer = Float8Linear(64, 32, config=configured(recipe))
    x = torch.randn(8, 64)
    before = layer(x)
    x.numpy()[:] *= 2
    after = layer(x)
    assert not torch.equal(after, before)
    assert torch.equal(after, layer(x.clone()))


@each_recipe
def test_a_functional_call_leaves_nothing_behind(recipe: str) -> None:
    layer = Float8Linear(64, 32, bias=False, config=configured(recipe))
    fresh = copy.deepcopy(layer)
    x = torch.randn(8, 64, requires_grad=True)
    for _ in range(5):
        other = {"weight": torch.randn(32, 64, requires_grad=True)}
        out = torch.func.functional_call(layer, other, (x,))
        plain = layer(x)
        assert torch.equal(plain, fresh(x))
        (grad,) = torch.autograd.grad(out.sum(), x)
        swapped = copy.deepcopy(fresh)
        swapped.load_state_dict(other)
        (expected,) = torch.autograd.grad(swapped(x).sum(), x)
        assert torch.equal(grad, expected)
        (grad,) = torch.autograd.grad(plain.sum(), x)
        (expected,) = torch.autograd.grad(fresh(x).sum(), x)
        assert torch.equal(grad, expected)


def test_there_is_no_second_derivative() -> None:
    layer = Float8Linear(64, 32)
    x = torch.randn(8, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


@each_recipe
def test_a_frozen_weight_saves_no_input(recipe: str) -> None:
    layer = Float8Linear(64, 32, bias=False, config=configured(recipe))
    layer.weight.requires_grad_(False)
    x = torch.randn(512, 64, requires_grad=True)
    assert saved_bytes(lambda: layer(x), layer.weight) == 0


@each_recipe
@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
def test_a_weight_is_cast_once_per_optimizer_step(recipe: str, recompute: bool, counter: Counter) -> None:
    layer = Float8Linear(64, 32, config=configured(recipe))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for step in range(1, 4):
        for _ in range(3):  # microbatches
            x = torch.randn(8, 64, requires_grad=True)
            out = checkpoint(layer, x, use_reentrant=False) if recompute else layer(x)
            out.square().mean().backward()
        # Again by the second microbatch of the first step, in which it turns out that a copy is worth keeping, and
        # until then by recomputation.
        assert counter.of(layer.weight) == USES[recipe] * (step + 1) + recompute
        optimizer.step()
        optimizer.zero_grad()


def test_a_copy_that_was_not_used_again_is_not_kept(counter: Counter) -> None:
    layer = Float8Linear(64, 32, config=configured("rowwise"))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    kept, casts = [], []
    for microbatches in (1, 1, 2, 2, 1, 1):
        for _ in range(microbatches):
            layer(torch.randn(8, 64, requires_grad=True)).sum().backward()
        kept.append(len(layer.copies.copies))
        casts.append(counter.of(layer.weight))
        optimizer.step()
        optimizer.zero_grad()
    # For the output and for grad_input each. What was used again is kept in the step after, until that shows otherwise.
    assert kept == [0, 0, 2, 2, 2, 0]
    assert casts == [2, 4, 8, 10, 12, 14]


@each_recipe
def test_force_recompute_keeps_nothing(recipe: str, counter: Counter) -> None:
    kept = Float8Linear(64, 32, config=configured(recipe))
    forced = copy.deepcopy(kept)
    forced = Float8Linear.from_float(forced.to_linear(), configured(recipe, force_recompute_fp8_weight_in_bwd=True))
    x = torch.randn(8, 64)
    grads = []
    for layer in (kept, forced):
        for _ in range(2):
            leaf = x.clone().requires_grad_()
            layer(leaf).square().sum().backward()
        grads.append((leaf.grad, layer.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]
    assert len(kept.copies.copies) == USES[recipe]
    assert len(forced.copies.copies) == 0
    assert counter.of(forced.weight) == 4  # forward and backward, twice


def through_data(p: nn.Parameter) -> None:
    p.data.mul_(0.5)


class Hidden(torch.optim.Optimizer):
    """An optimizer that writes where no version counter sees it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(0.5)


def in_place(layer: nn.Linear) -> None:
    with torch.no_grad():
        layer.weight.mul_(0.5)


def by_optimizer(layer: nn.Linear) -> None:
    Hidden(layer.parameters()).step()


def by_hand(layer: nn.Linear) -> None:
    layer.weight.data.mul_(0.5)
    layer.weight.grad = None


def another_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 0.5)


def loaded(layer: nn.Linear) -> None:
    layer.load_state_dict({name: value * 0.5 for name, value in layer.state_dict().items()})


def other_memory(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.detach() * 0.5


def by_vector(layer: nn.Linear) -> None:
    nn.utils.vector_to_parameters(layer.weight.detach().flatten() * 0.5, [layer.weight])


def rounded(layer: nn.Linear) -> None:
    layer.to(torch.bfloat16).to(torch.float32)


def told(layer: nn.Linear) -> None:
    layer.weight.data.mul_(0.5)
    assert isinstance(layer, Float8Linear)
    layer.forget_copies()


CHANGES = [in_place, by_optimizer, by_hand, another_parameter, loaded, other_memory, by_vector, rounded, told]


@each_recipe
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_never_stale(recipe: str, change: Callable[[nn.Linear], None]) -> None:
    layer = Float8Linear(64, 32, bias=False, config=configured(recipe))
    x = torch.randn(8, 64, requires_grad=True)
    for _ in range(2):
        before = layer(x)
        before.sum().backward()
    assert layer.copies.copies
    change(layer)
    fresh = Float8Linear(64, 32, bias=False, config=layer.config)
    fresh.load_state_dict(layer.state_dict())
    after = layer(x)
    assert torch.equal(after, fresh(x))
    assert not torch.equal(after, before)


def test_evaluation_reads_the_weight_as_it_is() -> None:
    """Averaged weights are often swapped in through ``.data``."""
    layer = Float8Linear(64, 32, bias=False)
    x = torch.randn(8, 64)
    before = layer(x)
    layer.eval()
    layer.weight.data.mul_(0.5)
    with torch.no_grad():
        assert not torch.equal(layer(x), before)


# ---- activation checkpointing and compilation


def block_model(recipe: str | None) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(ARGS)
    model.init_weights(WeightInit(model, seed=0))
    model = model.bfloat16()
    model.rope.data = rope_table(model.rope.shape[1], ARGS.head_size, ARGS.rope_theta)
    if recipe:
        convert_to_float8_training(model, config=DELAYED if recipe == "delayed" else configured(recipe))
    return model


def run_model(model: nn.Module, steps: int = 2) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        for microbatch in range(2):
            tokens = torch.randint(0, 256, (2, 33), generator=torch.Generator().manual_seed(2 * step + microbatch))
            loss = F.cross_entropy(model(tokens[:, :-1]).float().flatten(0, 1), tokens[:, 1:].flatten())
            loss.backward()
            losses.append(loss.item())
        sync_float8_amax_and_scale_history(model)
        optimizer.step()
        optimizer.zero_grad()
    losses.append(sum(p.double().norm().item() for p in model.parameters()))
    return losses


@pytest.mark.parametrize("recipe", [*RECIPES, "delayed"])
@pytest.mark.parametrize("options", [("full", "2"), ("selective", "2"), ("selective", "op")], ids="-".join)
def test_activation_checkpointing_changes_nothing(recipe: str, options: tuple[Any, str]) -> None:
    plain, wrapped = block_model(recipe), block_model(recipe)
    apply_activation_checkpoint(wrapped.layers, ActivationCheckpoint(*options))
    assert run_model(wrapped) == run_model(plain)


@each_recipe
def test_selective_checkpointing_of_a_region_that_begins_in_float8(recipe: str) -> None:
    """What it saves and what it computes again must be the same operations, also where an input is cast once."""
    torch.manual_seed(0)
    first = nn.Linear(64, 64)
    region = convert_to_float8_training(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)))
    other = convert_to_float8_training(nn.Linear(64, 64))
    grads = []
    for options in ({}, {"context_fn": _op_contexts}):
        h = first(torch.randn(32, 64, generator=torch.Generator().manual_seed(0)))
        out = checkpoint(region, h, use_reentrant=False, **options) if options else region(h)
        (out.square().sum() + other(h).square().sum()).backward()
        params = [*first.parameters(), *region.parameters(), *other.parameters()]
        grads.append([p.grad for p in params])
        for p in params:
            p.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "backend"),
    [
        ("rowwise", "aot_eager_decomp_partition"),  # all but the code for the machine
        ("delayed", "aot_eager_decomp_partition"),
        *(pytest.param(r, "inductor", marks=pytest.mark.long) for r in (*RECIPES, "delayed")),
    ],
)
def test_compiled_blocks(recipe: str, backend: str) -> None:
    """One graph for a whole block, compiled once, and the losses of eager mode."""
    eager, compiled = block_model(recipe), block_model(recipe)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    frames = []
    for layer in compiled.layers.values():
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend=counter)
    losses = run_model(compiled, 1)
    frames.append(counter.frame_count)
    losses += run_model(compiled, 1)
    frames.append(counter.frame_count)
    assert losses == pytest.approx(run_model(eager, 1) + run_model(eager, 1), rel=3e-3)
    assert frames == [1, 1]


# ---- delayed and static scaling


def test_delayed_scaling_against_its_definition() -> None:
    """Step by step against a few lines of plain Python."""
    config = dataclasses.replace(DELAYED, delayed_scaling_config=DelayedScalingConfig(history_len=3))
    layer = Float8Linear(32, 16, bias=False, config=config)
    amaxes: list[float] = []
    for step, factor in enumerate([1.0, 8.0, 0.1, 0.1, 0.1, 0.1]):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step)) * factor
        live = x.abs().max().item()
        used = 448 / (max(amaxes[-3:]) if amaxes else live)
        data = (x * used).clamp(-448, 448).to(torch.float8_e4m3fn).float() / torch.tensor(used)
        weight = layer.weight.detach()
        w_scale = 448 / weight.abs().max()
        w = (weight * w_scale).to(torch.float8_e4m3fn).float() / w_scale
        out = layer(x)
        assert torch.allclose(out, data @ w.T, rtol=1e-4, atol=1e-4 * out.abs().max().item())
        out.sum().backward()
        sync_float8_amax_and_scale_history(layer)
        amaxes.append(live)
        assert layer.fp8_amax_history_input.tolist() == pytest.approx(
            [*reversed(amaxes[-3:]), *[0.0] * (3 - len(amaxes))]
        )
        assert layer.fp8_amax_input.item() == 0


@pytest.mark.parametrize("mixed", ["input", "weight", "grad_output"])
def test_each_operand_has_its_own_scaling(mixed: str) -> None:
    config = Float8LinearConfig(**{f"cast_config_{mixed}": CastConfig(scaling_type=ScalingType.DELAYED)})  # type: ignore[arg-type]
    layer = Float8Linear(32, 16, config=config)
    assert [n for n, _ in layer.named_buffers()] == [
        f"fp8_amax_{mixed}",
        f"fp8_amax_history_{mixed}",
        f"fp8_scale_{mixed}",
    ]
    layer(torch.randn(4, 32, requires_grad=True)).sum().backward()
    assert layer.get_buffer(f"fp8_amax_{mixed}").item() > 0
    sync_float8_amax_and_scale_history(layer)
    assert layer.get_buffer(f"fp8_scale_{mixed}").item() > 0


def test_delayed_state_resumes_exactly() -> None:
    sync: Any = lambda model: lambda: sync_float8_amax_and_scale_history(model)  # noqa: E731
    straight = convert_to_float8_training(small_model(), config=DELAYED)
    first = train(straight, 3, sync(straight))
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(type(v) is Tensor for v in state.values())
    resumed = convert_to_float8_training(small_model(), config=DELAYED)
    resumed.load_state_dict(state)
    assert train(resumed, 3, sync(resumed), first=3) == train(straight, 3, sync(straight), first=3)
    assert first != train(convert_to_float8_training(small_model()), 3)  # it is not dynamic scaling under another name


def test_a_bad_step_does_not_spoil_the_history() -> None:
    layer = Float8Linear(32, 16, config=DELAYED)
    for x in (torch.ones(4, 32), torch.full((4, 32), math.inf), torch.full((4, 32), math.nan), torch.zeros(4, 32)):
        layer(x)
        sync_float8_amax_and_scale_history(layer)
    assert layer.fp8_amax_history_input.tolist()[:2] == [1.0, 0.0]
    assert layer.fp8_scale_input.item() == 448
    assert torch.isfinite(layer(torch.randn(4, 32))).all()


def test_evaluation_leaves_delayed_state_alone() -> None:
    layer = Float8Linear(32, 16, config=DELAYED).eval()
    layer(torch.randn(4, 32))
    assert layer.fp8_amax_input.item() == 0


def test_scales_survive_casts_and_the_meta_device() -> None:
    layer = Float8Linear(32, 16, config=DELAYED)
    layer(torch.randn(4, 32))
    sync_float8_amax_and_scale_history(layer)
    scale = layer.fp8_scale_input.clone()
    layer.bfloat16()
    assert layer.weight.dtype is torch.bfloat16
    assert layer.fp8_scale_input.dtype is torch.float32
    assert torch.equal(layer.fp8_scale_input, scale)
    with torch.device("meta"):
        fresh = Float8Linear(32, 16, config=DELAYED)
    fresh.to_empty(device="cpu")
    assert all(not b.any() for b in fresh.buffers())


def test_static_scaling() -> None:
    config = scaled_by(ScalingType.STATIC, input=100.0, weight=1000.0, grad_output=5000.0)
    layer = Float8Linear(32, 16, bias=False, config=config)
    x = torch.randn(16, 32)
    expected = (x * 100).to(torch.float8_e4m3fn).float() / 100
    w = (layer.weight.detach() * 1000).clamp(-448, 448).to(torch.float8_e4m3fn).float() / 1000
    assert torch.allclose(layer(x), expected @ w.T, rtol=1e-5, atol=1e-5)
    assert list(layer.state_dict()) == ["weight"]
    assert hash(config) == hash(scaled_by(ScalingType.STATIC, input=100.0, weight=1000.0, grad_output=5000.0))
    assert CastConfig(ScalingType.STATIC, static_scale=torch.tensor(2.0)).static_scale == 2.0  # type: ignore[arg-type]


# ---- state dicts


@each_recipe
def test_a_bf16_checkpoint_continues_in_float8_and_back(recipe: str) -> None:
    bf16 = small_model()
    train(bf16, 2)
    file = io.BytesIO()
    torch.save(bf16.state_dict(), file)
    file.seek(0)
    float8 = convert_to_float8_training(small_model(), config=configured(recipe))
    float8.load_state_dict(torch.load(file, weights_only=True))
    train(float8, 2)
    back = small_model()
    back.load_state_dict(float8.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), float8.parameters(), strict=True))


def test_a_checkpoint_without_delayed_state_starts_from_the_live_amax() -> None:
    bf16 = small_model()
    layer = convert_to_float8_training(small_model(), config=DELAYED)
    train(layer, 2, lambda: sync_float8_amax_and_scale_history(layer))
    layer.load_state_dict(bf16.state_dict())
    assert all(not b.any() for b in layer.buffers())
    part = scaled_by(ScalingType.DELAYED)
    part = dataclasses.replace(part, cast_config_weight=CastConfig(), cast_config_weight_for_grad_input=CastConfig())
    layer.load_state_dict(convert_to_float8_training(small_model(), config=part).state_dict())  # of some operands
    state = layer.state_dict()
    del state["0.fp8_scale_input"]  # but half of it is damage
    with pytest.raises(RuntimeError, match="fp8_scale_input"):
        layer.load_state_dict(state)


# ---- bad input


def refused(build: Callable[[], Any], *words: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error) as e:
        build()
    for word in words:
        assert word in str(e.value)


STATIC, AXISWISE = ScalingType.STATIC, ScalingGranularity.AXISWISE


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Float8LinearConfig.from_recipe_name("row"), ['"row"', "tensorwise, rowwise, rowwise_with_gw_hp"]),
        (lambda: CastConfig(STATIC), ["STATIC", "needs a static_scale"]),
        (lambda: CastConfig(static_scale=2.0), ["static_scale=2.0", "no effect", "DYNAMIC"]),
        (lambda: CastConfig(STATIC, static_scale=-1.0), ["-1.0", "positive and finite"]),
        (lambda: CastConfig(ScalingType.DELAYED, AXISWISE), ["DELAYED", "AXISWISE", "dynamic only"]),
        (lambda: CastConfig(target_dtype=torch.int8), ["torch.int8", "torch.float8_e4m3fn"]),
        (lambda: DelayedScalingConfig(history_len=0), ["history_len=0", "at least 1"]),
        (lambda: DelayedScalingConfig(scale_fn_name="mean"), ['"mean"', '"max"']),
        (
            lambda: Float8LinearConfig(cast_config_input=CastConfig(ScalingType.DISABLED)),
            ["cast_config_input", "DISABLED", "output", "both"],
        ),
        (
            lambda: Float8LinearConfig(
                cast_config_input=CastConfig(target_dtype=torch.float8_e4m3fn),
                cast_config_input_for_grad_weight=CastConfig(target_dtype=torch.float8_e5m2),
            ),
            ["e4m3fn", "e5m2", "same dtype"],
        ),
        (
            lambda: Float8LinearConfig(
                cast_config_input=CastConfig(ScalingType.DELAYED), cast_config_input_for_grad_weight=CastConfig()
            ),
            ["cast_config_input_for_grad_weight", "both matmuls"],
        ),
        (
            lambda: dataclasses.replace(DELAYED, enable_fsdp_float8_all_gather=True),
            ["enable_fsdp_float8_all_gather", "cast_config_weight.scaling_type=DELAYED", "DYNAMIC"],
        ),
        (
            lambda: Float8LinearConfig(
                cast_config_weight_for_grad_input=CastConfig(ScalingType.DISABLED),
                cast_config_grad_output=CastConfig(ScalingType.DISABLED),
                cast_config_grad_output_for_grad_weight=CastConfig(),
                enable_fsdp_float8_all_gather=True,
            ),
            ["enable_fsdp_float8_all_gather", "cast_config_weight_for_grad_input", "DISABLED"],
        ),
        (lambda: Float8Linear(30, 16), ["in_features=30", "multiples of 16"]),
        (lambda: Float8Linear.from_float(nn.Linear(30, 16)), ["multiples of 16"]),
        (
            lambda: convert_to_float8_training(convert_to_float8_training(small_model())),
            ['"0" is a Float8Linear already'],
        ),
        (
            lambda: convert_to_float8_training(small_model(), module_filter_fn=lambda m, n: n == "2" and False),
            ["nothing to convert", '"0": left out by module_filter_fn'],
        ),
        (lambda: convert_to_float8_training(nn.ReLU()), ["nothing to convert", "no linear layers"]),
        (lambda: convert_to_float8_training(nn.Linear(10, 10)), ["nothing to convert", "multiples of 16"]),
        (lambda: Float8Linear(32, 16)(torch.randn(4, 16)), ["(4, 16)", "32"]),
    ],
)
def test_bad_input(build: Callable[[], Any], words: list[str]) -> None:
    refused(build, *words)


def test_kernels_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "AVAILABLE", False)
    refused(lambda: configured("rowwise", kernels="triton"), 'kernels="triton"', "not installed", '"inductor"')
    configured("rowwise", kernels="auto")


def test_float8_all_gather_without_fsdp() -> None:
    model = convert_to_float8_training(
        small_model(), config=configured("tensorwise", enable_fsdp_float8_all_gather=True)
    )
    precompute_float8_dynamic_scale_for_fsdp(model)  # nothing is sharded yet: nothing to do
    refused(
        lambda: model(torch.randn(4, 64).bfloat16()), "enable_fsdp_float8_all_gather", "fully_shard", error=RuntimeError
    )
    assert all(type(v) is Tensor for v in model.state_dict().values())


def test_float8_all_gather_survives_the_replacement_of_a_weight() -> None:
    config = configured("tensorwise", enable_fsdp_float8_all_gather=True)
    model = convert_to_float8_training(small_model(), config=config)
    model.load_state_dict(small_model().state_dict(), assign=True)
    model[2].weight = nn.Parameter(torch.zeros(32, 96))
    assert all(isinstance(model[i].weight.data, ShardedWeight) for i in (0, 2))
    assert isinstance(Float8Linear(32, 32, config=config).weight.data, ShardedWeight)
    refused(model[0].to_linear, "to_linear", "FSDP2")


def test_float8_all_gather_of_a_weight_that_an_embedding_shares() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(64, 32), "output": nn.Linear(32, 64, bias=False)})
    model["output"].weight = model["embed"].weight
    config = configured("tensorwise", enable_fsdp_float8_all_gather=True)
    refused(lambda: convert_to_float8_training(model, config=config), "gathered in float8", '"embed.weight"')
    both = nn.ModuleDict({"a": nn.Linear(32, 32, bias=False), "b": nn.Linear(32, 32, bias=False)})
    both["b"].weight = both["a"].weight
    convert_to_float8_training(both, config=config)
    assert both["a"].weight is both["b"].weight


@pytest.mark.parametrize(
    ("architecture", "dtypes", "emulate", "compiled", "words"),
    [
        ("sm_90", devices.OCP, False, True, None),
        ("sm_89", devices.OCP, False, True, None),
        ("sm_100", devices.OCP, True, True, None),
        ("gfx942", devices.FNUZ, False, True, None),
        ("gfx950", devices.OCP, False, True, None),
        ("cpu", devices.FNUZ, False, True, None),
        ("sm_80", devices.OCP, True, False, None),
        ("sm_80", devices.OCP, False, False, None),
        ("sm_80", devices.OCP, True, True, ["sm_80", "only be emulated", "torch.compile"]),
        ("sm_80", devices.OCP, False, True, ["sm_80", "only be emulated", "torch.compile"]),
        ("sm_90", devices.FNUZ, False, False, ["torch.float8_e4m3fnuz", "sm_90", "emulate=True"]),
        ("gfx942", devices.OCP, False, False, ["torch.float8_e4m3fn", "gfx942", "torch.float8_e4m3fnuz"]),
        ("sm_90", devices.FNUZ, True, False, None),
    ],
)
def test_what_a_device_can_do(architecture: str, dtypes: Any, emulate: bool, compiled: bool, words: Any) -> None:
    reason = devices.why_not(architecture, set(dtypes), emulate=emulate, compiled=compiled)
    assert (reason is None) == (words is None)
    for word in words or []:
        assert word in str(reason)


@pytest.mark.parametrize(
    ("architecture", "cuda", "expected"),
    [
        ("sm_90", "12.9", True),
        ("sm_90", "13.0", True),
        ("sm_90", "12.8", False),
        ("sm_90", "12", False),
        ("sm_100", "13.0", False),
        ("sm_89", "12.9", False),
        ("gfx942", None, False),
        ("cpu", None, False),
    ],
)
def test_who_applies_scales_of_rows(
    architecture: str, cuda: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "architecture", lambda _: architecture)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert devices.scales_rows_in_matmuls(torch.device("cpu")) is expected


def test_emulation_is_said_once() -> None:
    script = """
import torch
from titanlite.float8 import Float8Linear
a, b = Float8Linear(16, 16), Float8Linear(16, 16)
for _ in range(3):
    b(a(torch.randn(2, 16)))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.count("float8 is emulated on cpu") == 1


def test_it_needs_neither_torchao_nor_the_rest_of_titanlite() -> None:
    script = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchao":
            raise ImportError(name)
sys.meta_path.insert(0, Gone())
import torch
from titanlite.float8 import convert_to_float8_training
import titanlite.float8.inference, titanlite.float8.float8_tensor_parallel
model = convert_to_float8_training(torch.nn.Linear(16, 16))
model(torch.randn(2, 16)).sum().backward()
inside = ("titanlite.float8", "titanlite.quant")
print([name for name in sys.modules if name.startswith("titanlite") and not name.startswith(inside)])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['titanlite']"


def test_public_names() -> None:
    assert {name.value for name in Float8LinearRecipeName} == set(RECIPES)
    assert Float8LinearConfig.from_recipe_name(Float8LinearRecipeName.ROWWISE) == configured("rowwise")
    config = configured("rowwise")
    assert "cast_configs=i:dyn_axs_e4m3,w:dyn_axs_e4m3,go:dyn_axs_e4m3" in repr(Float8Linear(16, 16, config=config))
    weight = ShardedWeight(torch.ones(2, 2), config.format)
    assert repr(weight) == f"ShardedWeight({torch.ones(2, 2)})"
    arrived = QuantTensor(torch.ones(2, 2).to(torch.float8_e4m3fn), torch.ones(()), torch.bfloat16)
    assert repr(arrived) == "QuantTensor(shape=(2, 2), torch.float8_e4m3fn for torch.bfloat16, scale=1.0)"


def test_a_layer_is_freed_with_its_last_reference() -> None:
    """Not by the garbage collector, which the trainer runs by itself and seldom."""
    layer = Float8Linear(32, 32, config=Float8LinearConfig(emulate=True))
    layer(torch.randn(4, 32)).sum().backward()
    weight = weakref.ref(layer.weight)
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()


def test_a_copy_has_a_state_of_its_own() -> None:
    layer = Float8Linear(32, 32, config=scaled_by(ScalingType.DELAYED))
    twin = copy.copy(layer)
    twin._buffers = {name: buffer.clone() for name, buffer in layer._buffers.items() if buffer is not None}
    twin(torch.full((4, 32), 3.0))
    assert twin.get_buffer("fp8_amax_input") == 3
    assert layer.get_buffer("fp8_amax_input") == 0
    assert twin.copies is not layer.copies


def test_a_layer_that_fsdp_shards_stays_what_it_is() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = Float8Linear(32, 32, config=Float8LinearConfig(emulate=True))
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        refused(layer.to_linear, "to_linear", "FSDP2")
    finally:
        dist.destroy_process_group()
