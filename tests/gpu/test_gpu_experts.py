"""Experts on a GPU: grouped matmuls against float64 and against emulation, a whole mixture, and runs. All but the runs
are computed on the CPU too, where the same code is checked without units."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.test_gpu_float8 import sqnr
from titanlite.models.layers import Mixture, MixtureArgs, grouped_mm
from titanlite.quant.devices import architecture
from titanlite.quant.float8.devices import has_grouped_matmuls
from titanlite.quant.grouped_mm import QuantGroupedMatmul, quantized_grouped_mm
from titanlite.quant.mx import grouped
from titanlite.quant.recipes import GROUPED_RECIPES, grouped_format

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
each_recipe = pytest.mark.parametrize("recipe", [*GROUPED_RECIPES])
SIZES = {"odd": [3, 17, 640, 1], "empty": [0, 333, 0, 7], "all in one": [0, 0, 700, 0], "no tokens": [0, 0, 0, 0]}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def operands(sizes: list[int], k: int, m: int, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows, the weight of each group [groups, m, k], offsets, and the gradient of the output."""
    torch.manual_seed(0)
    a, w, grad = torch.randn(sum(sizes), k), torch.randn(len(sizes), m, k), torch.randn(sum(sizes), m)
    offsets = torch.tensor(sizes, device=device).cumsum(0).int()
    return *(x.to(device, dtype).requires_grad_() for x in (a, w)), offsets, grad.to(device, dtype)


@each_device
@each_size
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("k", "m"), [(256, 384), (20, 12)])
def test_grouped_matmuls_against_float64(device: str, sizes: list[int], dtype: torch.dtype, k: int, m: int) -> None:
    a, w, offsets, grad = operands(sizes, k, m, device, dtype)
    exact_a, exact_w = (x.detach().cpu().double().requires_grad_() for x in (a, w))
    exact = torch.cat([x @ matrix.T for x, matrix in zip(exact_a.split(sizes), exact_w, strict=True)])
    wanted = [exact, *torch.autograd.grad(exact, (exact_a, exact_w), grad.cpu().double())]
    out = grouped_mm(a, w.transpose(1, 2), offsets)
    for mine, other in zip([out, *torch.autograd.grad(out, (a, w), grad)], wanted, strict=True):
        assert mine.dtype is dtype
        assert not other.any() or sqnr(other, mine.cpu()) > 40
        assert not mine.cpu()[other == 0].any()  # of empty groups


@each_device
@each_size
@each_recipe
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=ON_GPU)], ids=["", "compiled"])
def test_quantized_against_emulated(device: str, sizes: list[int], recipe: str, compiled: bool) -> None:
    if compiled:
        if device == "cpu":
            pytest.skip("the unit tests compile on the CPU")
        torch.compiler.reset()
    format = grouped_format(recipe)
    units = architecture(torch.device(device))
    float8, mxfp8 = has_grouped_matmuls(units), grouped.has_grouped_matmuls(units)
    native = (recipe == "float8_rowwise" and float8) or (recipe == "mxfp8" and mxfp8)
    assert format.for_groups(torch.device(device), torch.bfloat16).emulate == (not native)
    a, w, offsets, grad = operands(sizes, 256, 384, device, torch.bfloat16)
    multiply = torch.compile(quantized_grouped_mm, fullgraph=True) if compiled else quantized_grouped_mm
    results = []
    for function, chosen in ((multiply, format), (quantized_grouped_mm, format.emulated)):
        out = function(a, w.transpose(1, 2), offsets, chosen)
        results.append([out, *torch.autograd.grad(out, (a, w), grad)])
    for mine, other in zip(*results, strict=True):
        assert mine.dtype is torch.bfloat16
        assert not other.numel() or torch.equal(mine, other) or sqnr(other, mine) > 40


def stepped(mixture: Mixture, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The output of a mixture, and all gradients."""
    x = x.clone().requires_grad_()
    out = mixture(x)[0]
    return [out.detach(), *torch.autograd.grad(out, (x, *mixture.parameters()), grad)]


@each_device
@pytest.mark.parametrize("recipe", [None, *GROUPED_RECIPES])
def test_a_mixture_against_the_cpu(device: str, recipe: str | None) -> None:
    """The same tokens for each expert, and the same gradients. In a number format against its emulation."""
    torch.manual_seed(0)
    mixture = Mixture(256, MixtureArgs(8, 2, 128, n_shared_experts=1))
    for param in mixture.parameters():
        nn.init.normal_(param, std=0.05)
    mixture.bfloat16()
    if recipe is not None:
        mixture.experts.multiply = QuantGroupedMatmul(grouped_format(recipe), grouped_mm)
    x, grad = torch.randn(2, 64, 256).bfloat16(), torch.randn(2, 64, 256).bfloat16()
    there = copy.deepcopy(mixture).to(device)
    for mine, other in zip(stepped(there, x.to(device), grad.to(device)), stepped(mixture, x, grad), strict=True):
        assert sqnr(other, mine.cpu()) > 35
    with torch.no_grad():
        loads = [mix(x.to(where))[2][:8].cpu() for mix, where in ((there, device), (mixture, "cpu"))]
    assert torch.equal(*loads)


@pytest.mark.parametrize("moe_fqns", ["", "experts"])
@pytest.mark.parametrize("compile", ["false", "true"])
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_runs(train: Any, device: str, compile: str, moe_fqns: str) -> None:
    sizes = {"model__args__dim": 256, "model__args__expert_dim": 128, "model__args__n_layers": 2}
    common = {**sizes, "model__name": "qwen3_moe", "training__steps": 20, "training__compile": compile, "timeout": 600}
    bf16 = train(name="bf16", **common)
    assert bf16.status == 0, bf16.output
    float8 = {"model__converters": "float8", "float8__recipe_name": "rowwise"}
    run = train(name="float8", **common, **float8, float8__moe_fqns=moe_fqns)
    assert run.status == 0, run.output
    assert run.losses() == pytest.approx(bf16.losses(), rel=2e-2)
