"""Int8 and mxfp8 on a GPU: their kernels against the plain formulas, layers against emulation, and whole runs."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.gpu.test_gpu_float8 import sqnr, step
from titanlite.quant import kernels
from titanlite.quant.devices import architecture
from titanlite.quant.format import Format
from titanlite.quant.int8 import format as int8
from titanlite.quant.int8 import gpu
from titanlite.quant.int8.cpu import MULTIPLY
from titanlite.quant.int8.numerics import rescale
from titanlite.quant.kernels import reference
from titanlite.quant.linear import QuantLinear
from titanlite.quant.mx import format as mx
from titanlite.quant.mx import kernels as mx_kernels

UNITS = architecture(torch.device("cuda")) if torch.cuda.is_available() else "none"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
FORMATS = [
    pytest.param(
        format, marks=pytest.mark.skipif(not native(UNITS), reason=f"{UNITS} has no {format.name} units"), id=str(i)
    )
    for i, (format, native) in enumerate(
        [
            *((int8.Int8Format(tuple(list(int8._USES)[:count])), int8.is_native) for count in (1, 2, 3)),
            *((mx.MXFormat(grad_weight=grad_weight), mx.is_native) for grad_weight in (True, False)),
        ]
    )
]


def matrix(m: int, n: int) -> Tensor:
    """Rows of very different magnitudes, with a NaN and an infinity."""
    x = (torch.randn(m, n, device="cuda") * torch.exp(8 * torch.randn(m, 1, device="cuda"))).bfloat16()
    x[m // 2, n // 2], x[m // 3, n // 3] = math.nan, math.inf
    return x


SHAPES = [(8192, 4096), (1024, 14336), (333, 1000)]


@pytest.mark.parametrize("layouts", [("vector", "vector"), ("vector", "none"), ("none", "vector")])
def test_int8_casts_are_the_reference(layouts: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    for x in (matrix(*shape) for shape in SHAPES):
        data, scale, transposed, its_scale = kernels.cast(x, torch.int8, *layouts, False)
        expected = reference.cast(x, torch.int8, *layouts, False)
        for a, b in ((scale, expected[1]), (its_scale, expected[3])):
            assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1))
        rows, columns = scale.flatten().isfinite(), its_scale.flatten().isfinite()
        assert torch.equal(data[rows], expected[0][rows])
        assert torch.equal(transposed[columns], expected[2][columns])


@pytest.mark.parametrize("mode", ["floor", "rceil"])
def test_mxfp8_casts_are_the_reference(mode: str) -> None:
    torch.manual_seed(0)
    for x in (matrix(*shape) for shape in SHAPES):
        plain = mx_kernels.cast(x.cpu(), mode, True, True)
        for a, b in zip(mx_kernels.cast(x, mode, True, True), plain, strict=True):
            assert a.shape == b.shape
            assert ((a.cpu().float() == b.float()) | (a.cpu().float().isnan() & b.float().isnan())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("m", "k", "n"), [(4096, 4096, 4096), (333, 1000, 520), (1, 64, 8), (8192, 24, 264)])
def test_int8_products_are_exact(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8, device="cuda")
    b = torch.randint(-127, 128, (n, k), dtype=torch.int8, device="cuda").t()
    a[0], b[:, 0] = 127, -127
    scales = torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")
    expected = rescale(gpu._int_mm(a, b), *scales, dtype)
    assert torch.equal(MULTIPLY(a, scales[0], b, scales[1], dtype), expected)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("tokens", "dtype"), [((2, 256), torch.bfloat16), ((17,), torch.float32)], ids=str)
def test_layers_against_emulation(format: Format, compiled: bool, tokens: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    linear = nn.Linear(256, 384, device="cuda", dtype=dtype)
    x, grad = (torch.randn(*tokens, size, device="cuda", dtype=dtype) for size in (256, 384))
    native, emulated = (
        nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), form))
        for form in (format, format.emulated)  # type: ignore[attr-defined]
    )
    if compiled:
        native.compile(fullgraph=True)
    for a, b in zip(step(emulated, x, grad), step(native, x, grad), strict=True):
        assert a.dtype == b.dtype
        assert sqnr(a, b) > 40


@pytest.mark.parametrize(("converter", "native"), [("int8", int8.is_native(UNITS)), ("mx", mx.is_native(UNITS))])
@pytest.mark.parametrize("compile", ["false", "true"])
def test_runs(train: Any, converter: str, native: bool, compile: str) -> None:
    if not native:
        pytest.skip(f"{UNITS} has no units for {converter}")
    common = {"training__steps": 20, "training__compile": compile, "timeout": 600}
    bf16 = train(name="bf16", **common)
    run = train(name=converter, model__converters=converter, **common)
    assert run.status == 0, run.output
    assert "emulated" not in run.output
    assert run.losses() == pytest.approx(bf16.losses(), rel=2e-2)
