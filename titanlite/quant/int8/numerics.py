"""Int8 numerics: scales, rounding, and the exact product of integers.

A scale is the value of one step: ``q = clamp(round(x / scale))``, ``x ~ q * scale``, with
``scale = max(amax, EPS) / 127``. (In float8 it is the reciprocal of that.)
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
"""The range is symmetric: -128 is not used, so that a product of two values is at most 127 * 127."""

EPS = 1e-12
"""The smallest amax that a scale is computed from, so that an all-zero row gets a finite scale."""

LONGEST = 131_072
"""The longest sum of products that int32 holds: 131,072 * 127 * 127 < 2**31."""


def amax_of(x: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude along ``dim``, which is kept with size 1, in float32. NaN where there is a NaN, 0
    where nothing is."""
    if x.numel() == 0:
        return x.float().sum(dim, keepdim=True)
    return x.detach().abs().amax(dim, keepdim=True).float()


def amax_to_scale(amax: Tensor) -> Tensor:
    """Return the float32 scale with which ``amax`` becomes 127. Where ``amax`` is NaN or infinite it is NaN, and so is
    everything that is computed with it.

    Computed in float64, because eager and compiled code divide float32 differently.
    """
    scale = (amax.double().clamp(min=EPS) / LARGEST).float()
    return torch.where(amax.isfinite(), scale, torch.nan)


def inverse_of(scale: Tensor) -> Tensor:
    """Return ``1 / scale`` in float32, computed in float64 as the scale."""
    return scale.double().reciprocal().float()


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Round ``x / scale`` to int8, half to even. Where the scale is NaN, the values mean nothing.

    Args:
        scale: float32, broadcastable to ``x``.
    """
    return (x.detach().float() * inverse_of(scale)).round().clamp(-LARGEST, LARGEST).to(torch.int8)


def dequantize(data: Tensor, scale: Tensor) -> Tensor:
    """Return ``data * scale`` in float32."""
    return data * scale  # without a float32 copy of the data


ROOM = 17 / 16
"""The largest value of a row may grow by a sixteenth before its scale has to change again."""


def stochastically_rounded(x: Tensor, amax: Tensor, scale: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Round updated weights to int8, up or down with probabilities such that the mean is the exact value.

    A row keeps its scale while its values fit: what has not changed is then an integer still, and gets no rounding
    error. A row that outgrew its scale, or whose largest value fell below half of the range, gets a new one with some
    :data:`ROOM`.

    Args:
        x: float32, (rows, columns).
        amax: float32, (rows, 1): those of the whole rows.
        scale: float32, (rows, 1): the scales so far.
        bits: int32, of the shape of ``x``: uniform; 24 of them are used.

    Returns:
        The int8 data, and the float32 scales. Where ``amax`` is NaN or infinite, so is the scale: NaN.
    """
    fits = (amax <= scale * LARGEST) & (amax > scale * (LARGEST / 2))
    scale = torch.where(fits, scale, amax_to_scale(amax * ROOM))
    scaled = x * inverse_of(scale)
    below = scaled.floor()
    draws = (bits >> 8 & 0xFFFFFF).float() * 2.0**-24
    rounded = below + (draws < scaled - below)
    return rounded.clamp(-LARGEST, LARGEST).to(torch.int8), scale


def rescale(product: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the product of quantized values in ``dtype``: times the scales of the rows, (m, 1), and of the columns,
    (1, n), in float32."""
    return (product.float() * b * a).to(dtype)
