"""Float8 numerics: scales, rounding, quantization.

A scale is a multiplier: ``q = clamp(x * scale)``, ``x ~ q / scale``, with ``scale = fp8_max / max(amax, EPS)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12
"""The smallest amax that a scale is computed from, so that an all-zero tensor gets a finite scale."""

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_EXPONENT_BITS = -0x00800000  # sign and exponent of a float32, as int32


def amax_of(x: Tensor, dim: int | None = None) -> Tensor:
    """Return the largest magnitude in ``x``, in its dtype: of all elements, as a scalar tensor, or along ``dim``, which
    is kept with size 1. NaN if ``x`` has a NaN, 0 if it is empty."""
    if x.numel() == 0:
        return x.new_zeros(()) if dim is None else x.sum(dim, keepdim=True)
    magnitudes = x.detach().abs()
    return magnitudes.amax() if dim is None else magnitudes.amax(dim, keepdim=True)


def round_down_to_power_of_2(x: Tensor) -> Tensor:
    """Round ``x`` toward zero to a power of two; exact for every finite float32. Zero, infinity and NaN do not change.

    ``exp2(floor(log2(x)))`` is not exact: just below a power of two, log2 rounds up to the integer.
    """
    subnormal = x.abs() < _SMALLEST_NORMAL  # the leading bit is in the mantissa: scale up to a normal, and back
    bits = torch.where(subnormal, x * 2.0**32, x).view(torch.int32) & _EXPONENT_BITS
    power = bits.view(torch.float32)
    power = torch.where(subnormal, power * 2.0**-32, power)
    return torch.where(x.isnan(), x, power)


def amax_to_scale(amax: Tensor, dtype: torch.dtype, power_of_2: bool = False) -> Tensor:
    """Return the float32 scale that maps ``amax`` to the largest finite value of ``dtype``.

    Computed in float64, because eager and compiled code divide float32 differently. A NaN gives NaN. An infinite amax
    gives the scale 0, with which everything dequantizes to NaN.

    Args:
        power_of_2: round the scale down to a power of two, so that scaling only changes exponents.
    """
    scale = (torch.finfo(dtype).max / amax.double().clamp(min=EPS)).float()
    return round_down_to_power_of_2(scale) if power_of_2 else scale


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` to float8: ``x * scale`` in float32, clamped to the finite range of ``dtype``; NaN stays NaN.

    Args:
        scale: float32, broadcastable to ``x``.
    """
    largest = torch.finfo(dtype).max
    return (x.detach().float() * scale).clamp(-largest, largest).to(dtype)


def dequantize(data: Tensor, scale: Tensor, power_of_2: bool = False) -> Tensor:
    """Return ``data / scale`` in float32.

    Args:
        power_of_2: the scales are powers of two. Their reciprocals are exact, so that no element is divided.
    """
    return data.float() * scale.reciprocal() if power_of_2 else data.float() / scale
