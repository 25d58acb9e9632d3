"""The kernels of SwiGLU, on a GPU or in Triton's interpreter, and their plain operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE, Traffic, each_layout
from titanlite.quant.float8.numerics import dequantize
from titanlite.quant.kernels import launch, reference

E4M3 = torch.float8_e4m3fn
COPIES = ["none", "high_precision", "tensor", "vector"]


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


def inputs(m: int = 67, n: int = 144, *, exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """A gradient, a gate and its other factor. ``exact``: gates of which silu is exact in float32, however it takes the
    exponential function: large ones, which stay what they are, and zeros."""
    torch.manual_seed(0)
    gate = 3 * torch.randn(m, n)
    if exact:
        gate = torch.where(gate.abs() < 1, 0, gate.abs().exp2().round() + 120)
    up = torch.randn(m, n) * torch.exp(4 * torch.randn(m, 1))
    return torch.randn(m, n).bfloat16(), gate.bfloat16(), up.bfloat16()


@each_layout
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("power_of_2", [True, False])
def test_casts_are_those_of_the_product(by_rows: str, by_columns: str, bad: float | None, power_of_2: bool) -> None:
    _, gate, up = inputs(exact=True)
    if bad is not None:
        up[3, 5] = bad
    amaxes = launch.amaxes(up.to(DEVICE), by_rows, by_columns, gate.to(DEVICE))
    outputs = launch.cast_with(up.to(DEVICE), amaxes, E4M3, by_rows, by_columns, power_of_2, gate.to(DEVICE))
    product = (gate.double() * up.double()).bfloat16()
    for a, b in zip(outputs, reference.cast(product, E4M3, by_rows, by_columns, power_of_2), strict=True):
        assert torch.equal(a.cpu().float().nan_to_num(1e9), b.float().nan_to_num(1e9))


@pytest.mark.parametrize("by_columns", COPIES)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("way", [launch, reference], ids=["triton", "reference"])
def test_backward_is_that_of_float64(by_columns: str, exact: bool, way: Any) -> None:
    grad, gate, up = inputs(exact=exact)
    device = DEVICE if way is launch else "cpu"
    g, u = (t.double().requires_grad_() for t in (gate, up))
    product = F.silu(g) * u
    expected = torch.autograd.grad(product, (g, u), grad.double())
    amaxes = torch.empty(0, dtype=torch.int32)
    if by_columns in ("tensor", "vector"):
        amaxes = reference.amaxes(product.detach().bfloat16(), "none", by_columns)
    grad_up, *given = (t.to(device) for t in (grad, gate, up, amaxes))
    grad_gate, again, scale = (t.cpu() for t in way.swiglu_backward(grad_up, *given, E4M3, by_columns, True))
    for a, b in zip((grad_gate, grad_up.cpu()), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-6)
    if by_columns == "none":
        assert again.numel() == 0
    elif by_columns == "high_precision":
        torch.testing.assert_close(again.double(), product.detach(), rtol=2**-8, atol=1e-6)
    else:
        *_, data, its_scale = reference.cast(product.detach().bfloat16(), E4M3, "none", by_columns, True)
        assert torch.equal(scale, its_scale)
        # The exponential functions differ, by which a product can come to lie on the other side of a tie.
        assert (again.float() != data.float()).float().mean() <= (0 if exact else 1e-3)
        step = 2.0**-3 * data.float().abs() + 2.0**-9
        assert ((again.float() - data.float()).abs() <= step).all()


@pytest.mark.parametrize("by_columns", COPIES)
def test_factors_that_are_slices(by_columns: str) -> None:
    """As of one matmul for both: rows lie apart, and are not moved together."""
    grad, *factors = (t.to(DEVICE) for t in inputs(32, 80, exact=True))
    both = torch.cat(factors, 1)
    amaxes = launch.amaxes(factors[1], "none", by_columns, factors[0]) if by_columns in ("tensor", "vector") else grad
    results = []
    for gate, up in (factors, both.chunk(2, 1)):
        grad_up = grad.clone()
        assert gate.is_contiguous() == (gate is factors[0])
        results.append((*launch.swiglu_backward(grad_up, gate, up, amaxes, E4M3, by_columns, True), grad_up))
        if by_columns in ("tensor", "vector"):
            results[-1] += (launch.amaxes(up, "none", by_columns, gate),)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a.float(), b.float())
    with pytest.raises(ValueError, match="must be contiguous"):
        launch.swiglu_backward(grad.t(), gate.t(), up.t(), amaxes, E4M3, by_columns, True)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the operators on the CPU")
@pytest.mark.parametrize("scales", ["tensor", "vector"])
def test_operators_keep_their_promises(scales: str) -> None:
    """What they write to, and the shapes of what they return, are those that the compiler is told."""
    grad, gate, up = inputs(16, 32)
    ops = torch.ops.titanlite_quant
    for by_rows, by_columns in ((scales, "none"), ("none", scales)):
        amaxes = ops.amaxes(up, by_rows, by_columns, gate)
        torch.library.opcheck(ops.amaxes, (up, by_rows, by_columns, gate))
        torch.library.opcheck(ops.cast, (up, amaxes, E4M3, by_rows, by_columns, True, gate))
    for by_columns in ("none", "high_precision", scales):
        torch.library.opcheck(ops.swiglu_backward, (grad, gate, up, amaxes, E4M3, by_columns, True))


@pytest.mark.parametrize("way", [launch, reference], ids=["triton", "reference"])
def test_extreme_gates(way: Any) -> None:
    """Where exp overflows or vanishes there is still a product, and there are gradients."""
    device = DEVICE if way is launch else "cpu"
    gate = torch.tensor([[-3e38, -1000, -100, -88, 88, 100, 1000, 1e30] * 2]).bfloat16().to(device)
    up, grad_up = torch.ones_like(gate), torch.ones_like(gate)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    grad_gate, product, _ = way.swiglu_backward(grad_up, gate, up, empty, E4M3, "high_precision", True)
    for tensor in (grad_up, product):
        torch.testing.assert_close(tensor, gate.clamp(min=0), rtol=0, atol=1e-30)
    torch.testing.assert_close(grad_gate, (gate > 0).to(gate.dtype), rtol=0, atol=1e-30)


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
def test_bytes_moved_per_element() -> None:
    grad, gate, up = inputs(256, 512)
    with Traffic() as traffic:
        amaxes = launch.amaxes(up, "none", "vector", gate)
        launch.cast_with(up, launch.amaxes(up, "vector", "none", gate), E4M3, "vector", "none", True, gate)
    assert 8 <= traffic.read / up.numel() <= 8 * 1.05  # both factors, twice
    assert 1 <= traffic.written / up.numel() <= 1.05
    with Traffic() as traffic:
        launch.swiglu_backward(grad, gate, up, amaxes, E4M3, "vector", True)
    assert 6 <= traffic.read / up.numel() <= 6 * 1.05
    assert 5 <= traffic.written / up.numel() <= 5 * 1.05


def test_the_error_of_the_cast_is_that_of_float8() -> None:
    """Against the product in float64."""
    _, gate, up = inputs(128, 256)
    amaxes = reference.amaxes(up, "none", "vector", gate)
    _, data, scale = reference.swiglu_backward(up.clone(), gate, up, amaxes, E4M3, "vector", True)
    product = F.silu(gate.double()) * up.double()
    error = (dequantize(data.t(), scale).double() - product).norm() / product.norm()
    assert error < 0.04
