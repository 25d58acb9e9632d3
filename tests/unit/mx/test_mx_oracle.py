"""Linear layers in mxfp8 against torchao's emulated ones, and their casts against its casts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.float8.test_float8_oracle import KINDS, sqnr, step, values
from titanlite.quant.format import Use
from titanlite.quant.linear import QuantLinear
from titanlite.quant.mx.format import MXFormat
from titanlite.quant.mx.numerics import BLOCK, ScaleMode, dequantize, quantize, swizzled

pytest.importorskip("torchao.prototype.mx_formats")
from torchao.prototype.moe_training.mxfp8_linear import _to_mxfp8_then_scaled_mm
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.mx_tensor import to_mx
from torchao.prototype.mx_formats.utils import to_blocked
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

MODES: dict[ScaleMode, Any] = {"floor": ScaleCalculationMode.FLOOR, "rceil": ScaleCalculationMode.RCEIL}
IN, OUT = 64, 96


class Theirs(nn.Linear):
    def __init__(self, linear: nn.Linear, mode: ScaleMode, grad_weight: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.options = KernelPreference.EMULATED, MODES[mode], not grad_weight

    def forward(self, input: Tensor) -> Tensor:
        out: Tensor = _to_mxfp8_then_scaled_mm(input, self.weight, *self.options)
        return out if self.bias is None else out + self.bias


def ours(linear: nn.Linear, format: MXFormat) -> nn.Module:
    return nn.Sequential(QuantLinear.from_linear(copy.deepcopy(linear), format))


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("contracted", [0, 1])
def test_bytes_and_scales(dtype: torch.dtype, kind: str, mode: ScaleMode, contracted: int) -> None:
    x = values(kind, 96, IN).to(dtype)
    operand = MXFormat(mode, emulate=True).cast(x, Use("input", contracted))
    operand = operand if contracted else operand.t()
    scale, data = to_mx((x if contracted else x.t()).contiguous(), torch.float8_e4m3fn, BLOCK, MODES[mode])
    assert operand.scale is not None
    assert same_bytes(operand.scale, scale)
    assert same_bytes(operand.data, data)


@pytest.mark.parametrize("mode", MODES)
def test_scales_of_all_exponents(mode: ScaleMode) -> None:
    """The scale is exact for amaxes just below, at, and just above each power of two, and each 1.75 times that."""
    powers = torch.ldexp(torch.ones(253, dtype=torch.float64), torch.arange(-126, 127)).float()
    amaxes = torch.cat([f(p) for p in (powers, powers * 1.75) for f in (below, lambda x: x, above)])
    data, scale = quantize(amaxes[:, None].expand(-1, BLOCK), mode)
    ideal = torch.floor(exact_log2(amaxes)) - 8
    if mode == "rceil":
        ideal = ideal + (torch.ldexp(amaxes.double(), -ideal.int()) > 448)
    assert torch.equal(scale.flatten() - 127.0, ideal.clamp(min=-127).float())
    # Without a cut-off, the largest error of e4m3 is half a step of 1/8; with one, 2 becomes 1.75.
    kept = amaxes > 2.0**-118
    error = (dequantize(data, scale)[:, 0].double() / amaxes - 1).abs()[kept]
    assert error.max() <= (1 / 16 if mode == "rceil" else 1 / 8)


def below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.tensor(0.0))


def above(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.tensor(math.inf))


def exact_log2(x: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(x.double())  # the mantissa is in [0.5, 1)
    return exponent - 1 + torch.log2(2 * mantissa).clamp(0, 1 - 1e-9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_makes_its_block_nan(value: float, mode: ScaleMode) -> None:
    """torchao loses an infinity: it becomes 448 times the scale."""
    x = values("random", 3, 2 * BLOCK)
    x[1, 40] = value
    block = torch.zeros(3, 2 * BLOCK, dtype=torch.bool)
    block[1, BLOCK:] = True
    assert torch.equal(dequantize(*quantize(x, mode)).isnan(), block)
    out = ours(nn.Linear(2 * BLOCK, BLOCK), MXFormat(mode))(x)
    assert torch.equal(out.isnan(), block[:, -1:].expand_as(out))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (130, 5), (256, 8), (300, 3)])
def test_swizzled_scales_are_torchaos(shape: tuple[int, int]) -> None:
    scale = torch.randint(0, 255, shape, dtype=torch.uint8)
    assert same_bytes(swizzled(scale), to_blocked(scale))


@pytest.mark.parametrize("grad_weight", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "bias"), [((96,), False), ((2, 32), True), ((2, 3, 16), False)])
def test_layers(grad_weight: bool, kind: str, mode: ScaleMode, shape: tuple[int, ...], bias: bool) -> None:
    linear = nn.Linear(IN, OUT, bias=bias)
    x, grad = values(kind, *shape, IN), values("random", *shape, OUT)
    expected = step(nn.Sequential(Theirs(linear, mode, grad_weight)), x, grad)
    result = step(ours(linear, MXFormat(mode, grad_weight=grad_weight)), x, grad)
    assert expected.keys() == result.keys()
    for name in expected:
        assert sqnr(expected[name], result[name]) > 110, name


@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_tokens_that_fill_no_block(tokens: int) -> None:
    """They give what they give with tokens of zeros behind them."""
    linear = nn.Linear(IN, OUT)
    x, grad = values("random", tokens, IN), values("random", tokens, OUT)
    padding = (0, 0, 0, -tokens % BLOCK)
    result = step(ours(linear, MXFormat()), x, grad)
    padded = step(ours(linear, MXFormat()), nn.functional.pad(x, padding), nn.functional.pad(grad, padding))
    for name, value in result.items():
        whole = padded[name][:tokens] if name in ("output", "grad_input") else padded[name]
        torch.testing.assert_close(value, whole)


def test_compiled_is_the_same() -> None:
    linear = nn.Linear(IN, OUT)
    x, grad = values("outliers", 48, IN), values("random", 48, OUT)
    expected, compiled = step(ours(linear, MXFormat()), x, grad), ours(linear, MXFormat())
    compiled.compile()
    for name, value in step(compiled, x, grad).items():
        assert sqnr(expected[name], value) > 110, name
