"""Float8 on float8 units: the native matmuls against emulation, and whole runs of every recipe."""

from __future__ import annotations

import copy
import dataclasses
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from titanlite.float8 import Float8LinearConfig, convert_to_float8_training, swiglu_linear
from titanlite.float8.inference import Float8DynamicActivationFloat8WeightConfig, PerRow, PerTensor, quantize_
from titanlite.quant.float8 import devices

NATIVE = torch.cuda.is_available() and devices.has_native_float8(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="needs a GPU with float8 units")]

RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
each_recipe = pytest.mark.parametrize("recipe", RECIPES)


def sqnr(reference: Tensor, other: Tensor) -> float:
    reference, other = reference.double(), other.double()
    return (20 * torch.log10(reference.norm() / (reference - other).norm().clamp(min=1e-300))).item()


def step(model: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    out = model(x)
    out.backward(grad)
    assert x.grad is not None
    return [out, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@each_recipe
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("tokens", [(512,), (2, 3, 7), (1,), (17,)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_native_against_emulated(recipe: str, dtype: torch.dtype, tokens: tuple[int, ...], bias: bool) -> None:
    compare_with_emulated(recipe, dtype, tokens, bias, compiled=False)


@each_recipe
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("tokens", "bias"), [((512,), False), ((17,), True)], ids=str)
def test_compiled_against_emulated(recipe: str, dtype: torch.dtype, tokens: tuple[int, ...], bias: bool) -> None:
    torch.compiler.reset()  # whose limit of compilations per function is lower than there are cases
    compare_with_emulated(recipe, dtype, tokens, bias, compiled=True)


def compare_with_emulated(recipe: str, dtype: torch.dtype, tokens: tuple[int, ...], bias: bool, compiled: bool) -> None:
    torch.manual_seed(0)
    config = Float8LinearConfig.from_recipe_name(recipe)
    linear = nn.Linear(256, 384, bias=bias, device="cuda", dtype=dtype)
    native = convert_to_float8_training(nn.Sequential(copy.deepcopy(linear)), config=config)
    emulated = convert_to_float8_training(
        nn.Sequential(copy.deepcopy(linear)), config=dataclasses.replace(config, emulate=True)
    )
    x = torch.randn(*tokens, 256, device="cuda", dtype=dtype)
    grad = torch.randn(*tokens, 384, device="cuda", dtype=dtype)
    expected = step(emulated, x, grad)
    results = step(torch.compile(native, fullgraph=True) if compiled else native, x, grad)
    for a, b in zip(expected, results, strict=True):
        assert a.dtype == b.dtype
        assert sqnr(a, b) > 40  # fast accumulation keeps about 14 bits


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3 = (nn.Linear(256, 512, bias=False) for _ in range(2))
        self.w2 = nn.Linear(512, 256, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu_linear(self.w2, self.w1(x), self.w3(x))


@each_recipe
@pytest.mark.parametrize("compiled", [False, True])
def test_swiglu_against_emulated(recipe: str, compiled: bool) -> None:
    """Emulated, the product is rounded twice, which float8's own rounding makes more of."""
    torch.compiler.reset()
    torch.manual_seed(0)
    config = Float8LinearConfig.from_recipe_name(recipe)
    native = FeedForward().to("cuda", torch.bfloat16)
    emulated = copy.deepcopy(native)
    convert_to_float8_training(native, config=config)
    convert_to_float8_training(emulated, config=dataclasses.replace(config, emulate=True))
    x = torch.randn(2, 384, 256, device="cuda", dtype=torch.bfloat16)
    grad = torch.randn_like(x)
    expected = step(emulated, x, grad)
    if compiled:
        native.compile(fullgraph=True)
    for a, b in zip(step(native, x, grad), expected, strict=True):
        assert sqnr(b, a) > 26


@each_recipe
def test_outliers_zeros_and_nans(recipe: str) -> None:
    linear = nn.Linear(256, 256, bias=False, device="cuda", dtype=torch.bfloat16)
    model = convert_to_float8_training(nn.Sequential(linear), config=Float8LinearConfig.from_recipe_name(recipe))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    x[0] = 0
    x[1] *= 1e6
    assert torch.isfinite(model(x)).all()
    for bad in (float("nan"), float("inf")):
        x[2, 3] = bad
        rows = model(x).isnan().all(1)
        assert rows.all() if recipe == "tensorwise" else rows.nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("granularity", [PerTensor(), PerRow()], ids=str)
def test_inference(granularity: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).cuda().bfloat16()
    x = torch.randn(4, 33, 256, device="cuda", dtype=torch.bfloat16)
    expected = model(x)
    quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    with torch.inference_mode():
        assert sqnr(expected, model(x)) > 22


# ---- whole runs


@each_recipe
@pytest.mark.parametrize("compile", ["false", "true"])
def test_debugmodel(train: Any, recipe: str, compile: str) -> None:
    common = {"training__steps": 20, "training__compile": compile, "timeout": 600}
    bf16 = train(name="bf16", **common)
    run = train(name="float8", model__converters="float8", float8__recipe_name=recipe, **common)
    assert run.status == 0, run.output
    assert "emulated" not in run.output
    if compile == "true":
        assert re.search("float8.kernels +(inductor|triton): forward and backward of", run.output), run.output
    assert run.losses() == pytest.approx(bf16.losses(), rel=2e-2)


@pytest.mark.parametrize("precompute", ["false", "true"])
def test_float8_all_gather_changes_no_loss(train: Any, precompute: str) -> None:
    options = {"model__converters": "float8", "training__steps": 10, "training__deterministic": "true"}
    off = train(name="off", **options)
    on = train(
        name="on",
        float8__enable_fsdp_float8_all_gather="true",
        float8__precompute_float8_dynamic_scale_for_fsdp=precompute,
        **options,
    )
    assert on.status == 0, on.output
    assert on.losses() == off.losses()


def test_delayed_scaling(train: Any) -> None:
    delayed = {f"float8__scaling_type_{operand}": "delayed" for operand in ("input", "weight", "grad_output")}
    bf16 = train(name="bf16", training__steps=20)
    run = train(name="float8", model__converters="float8", training__steps=20, **delayed)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16.losses(), rel=2e-2)


@each_recipe
@pytest.mark.parametrize("compile", ["false", "true"])
def test_1b(train: Any, recipe: str, compile: str) -> None:
    run = train(
        model__flavor="1B",
        model__converters="float8",
        float8__recipe_name=recipe,
        float8__filter_fqns="output",
        training__compile=compile,
        training__seq_len=1024,
        training__local_batch_size=2,
        training__steps=10,
        activation_checkpoint__mode="selective",
        activation_checkpoint__selective_ac_option="op",
        timeout=600,
    )
    assert run.status == 0, run.output
    assert "emulated" not in run.output
    losses = run.losses()
    assert losses[-1] < losses[0]
