"""The float8 numbers: scales, rounding, quantization.

A scale is a multiplier: ``q = clamp(x * scale)``, ``x ~ q / scale``, with ``scale = fp8_max / max(amax, EPS)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
"""The smallest amax a scale is computed from: an all-zero tensor gets a finite scale."""

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_EXPONENT_BITS = -0x00800000  # sign and exponent of a float32, as int32


def amax_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude of ``x`` in its dtype: of all elements, as a scalar tensor, or along ``dim``, which is kept
    with size 1. NaN if there is one, 0 of nothing."""
    if x.numel() == 0:
        return x.new_zeros(()) if dim is None else x.sum(dim, keepdim=True)
    magnitudes = x.detach().abs()
    return magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)


def round_down_to_power_of_2(x: Tensor) -> Tensor:
    """The largest power of two not above ``x`` in magnitude, with its sign; exact for every finite float32.

    ``exp2(floor(log2(x)))`` is not: just below a power of two log2 rounds up to the whole number. Zero, infinity and
    NaN stay what they are.
    """
    subnormal = x.abs() < _SMALLEST_NORMAL  # has its leading bit in the mantissa: shift it out of there and back
    bits = torch.where(subnormal, x * 2.0**32, x).view(torch.int32) & _EXPONENT_BITS
    power = bits.view(torch.float32)
    power = torch.where(subnormal, power * 2.0**-32, power)
    return torch.where(x.isnan(), x, power)


def amax_to_scale(amax: Tensor, dtype: torch.dtype, power_of_2: bool = False) -> Tensor:
    """The float32 scale at which ``amax`` becomes the largest finite value of ``dtype``.

    In float64, so that eager and compiled code, which divide float32 differently, agree to the bit. NaN gives NaN, and
    an infinite amax the scale 0, at which everything dequantizes to NaN.

    Args:
        power_of_2: round the scale down to a power of two: scaling then only shifts exponents.
    """
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=EPS)).float()
    return round_down_to_power_of_2(scale) if power_of_2 else scale


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` in float8: ``x * scale`` in float32, saturated to the finite range of ``dtype``; NaN stays NaN.

    Args:
        scale: float32, broadcastable to ``x``.
    """
    largest = torch.finfo(dtype).max
    return (x.detach().float() * scale).clamp(-largest, largest).to(dtype)


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """The float32 values that ``data`` at ``scale`` stands for."""
    return data.float() / scale
