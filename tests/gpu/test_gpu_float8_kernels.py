"""The Triton kernels on a GPU, at the sizes they are for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.float8 import devices
from titanlite.quant.kernels import reference

NATIVE = torch.cuda.is_available() and devices.has_native_float8(torch.device("cuda"))
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not NATIVE, reason="needs a GPU with float8 units")]

RECIPES = {  # the casts that the recipes make, as (by_rows, by_columns, power_of_2)
    "tensorwise": [("tensor", "tensor", False), ("tensor", "none", False), ("none", "tensor", False)],
    "rowwise": [("vector", "vector", True), ("vector", "none", True), ("none", "vector", True)],
}


def check(x: Tensor, dtype: torch.dtype, *arguments: Any) -> None:
    outputs = kernels.cast(x, dtype, *arguments)
    for a, b in zip(outputs, reference.cast(x, dtype, *arguments), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert ((a.float() == b.float()) | (a.float().isnan() & b.float().isnan())).all()


def matrix(m: int, n: int) -> Tensor:
    """Rows of very different magnitudes."""
    return (torch.randn(m, n, device="cuda") * torch.exp(8 * torch.randn(m, 1, device="cuda"))).bfloat16()


@pytest.mark.parametrize("recipe", RECIPES)
def test_casts_are_the_reference(recipe: str) -> None:
    """Each kernel takes a second or so to compile for each kind of shape: those that recipes and layers have."""
    torch.manual_seed(0)
    for arguments in RECIPES[recipe]:
        for shape in [(8192, 4096), (1024, 14336), (336, 1008)]:
            x = matrix(*shape)
            for bad in (0.0, float("nan"), float("inf")):
                x[shape[0] // 2, shape[1] // 2] = bad
                check(x, torch.float8_e4m3fn, *arguments)
    both = RECIPES[recipe][0]
    check(matrix(333, 1000), torch.float8_e4m3fn, *both)
    check(matrix(512, 512), torch.float8_e5m2, *both)
    check(matrix(512, 512).float(), torch.float8_e4m3fn, *both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rescaling(dtype: torch.dtype) -> None:
    product = torch.randn(8192, 4096, device="cuda").to(dtype)
    rows, columns = torch.rand(8192, 1, device="cuda") * 1e3, torch.rand(1, 4096, device="cuda") * 1e-3
    for scales in ((rows, columns), (rows, columns[0, 0]), (rows[0, 0], columns)):
        assert torch.equal(kernels.rescale(product, *scales, dtype), reference.rescale(product, *scales, dtype))


def different(a: Tensor, b: Tensor) -> float:
    """The share of numbers that are."""
    assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True)
    return float((a.float() != b.float()).float().mean()) if a.numel() else 0.0


@pytest.mark.parametrize(("scales", "power_of_2"), [("tensor", False), ("vector", True)])
@pytest.mark.parametrize("shape", [(8192, 14336), (333, 1008)], ids=str)
def test_swiglu(scales: Any, power_of_2: bool, shape: tuple[int, int]) -> None:
    """The kernels take the exponential function of other instructions than PyTorch: seldom is a rounding another."""
    torch.manual_seed(0)
    gate, grad = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    up = matrix(*shape)
    product = reference.swiglu(gate, up)
    arguments = (torch.float8_e4m3fn, scales, scales, power_of_2)
    data, scale, amaxes = kernels.swiglu_cast(gate, up, *arguments)
    by_rows, its_scale, by_columns, scale_of_columns = reference.cast(product, *arguments)
    for a, b in ((data, by_rows), (scale, its_scale), (amaxes, reference.amaxes(product, "none", scales))):
        assert different(a, b) < 1e-3
    arguments = (torch.float8_e4m3fn, scales, power_of_2)
    grad_up = grad.clone()
    grad_gate, *_ = reference.swiglu_backward(grad_up, gate, up, amaxes, *arguments)
    expected = (grad_gate, grad_up, by_columns, scale_of_columns)
    for a, b in zip(kernels.swiglu_backward(grad.clone(), gate, up, amaxes, *arguments), expected, strict=True):
        assert different(a, b) < 1e-3
    *_, again, _ = kernels.swiglu_backward(grad, gate, up, amaxes, arguments[0], "high_precision", power_of_2)
    assert different(again, product) < 1e-3
