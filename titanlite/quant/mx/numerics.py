"""The numerics of mxfp8: OCP Microscaling Formats 1.0 with elements of type e4m3, in blocks of 32.

Each block has a scale, a power of two stored as its biased exponent: ``x ~ q * 2**(exponent - 127)``; 255 is NaN. The
exponents are uint8. ``torch.float8_e8m0fnu`` is the dtype of the same bytes, which the compiler does not know on CPUs.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 32
TILE_ROWS, TILE_BLOCKS = 128, 4
"""The rows and blocks of a tile of scales, as the matmul units of sm_100 read them."""
LARGEST = 448.0
"""The largest finite value of e4m3."""

ScaleMode = Literal["rceil", "floor"]

BIAS = 127
NAN = 255
MANTISSA_BITS = 23
MANTISSA = (1 << MANTISSA_BITS) - 1
# 448 = 1.75 * 2**8
EXPONENT_OF_LARGEST = 8
MANTISSA_OF_LARGEST = 3 << (MANTISSA_BITS - 2)


def _exponents(amax: Tensor, mode: ScaleMode) -> Tensor:
    """Return the biased exponents, int32, of the scales of blocks with these amaxes: 0 to 247, or 255 for NaN.

    - floor: ``floor(log2 amax) - 8``, as in section 6.3 of the standard. Values above 1.75 times the largest power of
      two below amax are cut off to 448.
    - rceil: the smallest power of two with which no value is cut off, ``ceil(log2(amax / 448))``.

    Both are read from the bits of the float32, because log2 rounds.
    """
    bits = amax.view(torch.int32)
    exponents = (bits >> MANTISSA_BITS) - EXPONENT_OF_LARGEST
    if mode == "rceil":
        exponents = exponents + ((bits & MANTISSA) > MANTISSA_OF_LARGEST).int()
    return torch.where(amax.isfinite(), exponents.clamp(min=0), NAN)


def quantize(x: Tensor, mode: ScaleMode) -> tuple[Tensor, Tensor]:
    """Cast ``x`` (rows, columns) in blocks of 32 along its columns, padded with zeros to whole blocks.

    A block with a NaN or an infinity becomes NaN.

    Returns:
        The values, e4m3, (rows, padded columns), contiguous; and the exponents of the scales,
        uint8, (rows, padded columns / 32).
    """
    x = F.pad(x.detach(), (0, -x.shape[1] % BLOCK))
    return quantize_blocks(x, amax_of_blocks(x), mode)


def _blocks(x: Tensor) -> Tensor:
    return x.detach().float().unflatten(-1, (x.shape[-1] // BLOCK, BLOCK))


def amax_of_blocks(x: Tensor) -> Tensor:
    """Return the largest magnitudes, float32, (..., columns / 32), of the blocks of ``x`` (..., columns)."""
    return _blocks(x).abs().amax(-1)


def quantize_blocks(x: Tensor, amax: Tensor, mode: ScaleMode) -> tuple[Tensor, Tensor]:
    """Cast ``x`` (..., columns), of whole blocks, as :func:`quantize`, with the scales of their amaxes."""
    exponents = _exponents(amax, mode)
    # The reciprocal of the scale, by its bits. The exponents of finite blocks are at most 247, so that it is normal.
    inverse = ((2 * BIAS - exponents) << MANTISSA_BITS).view(torch.float32)
    inverse = torch.where(exponents == NAN, torch.nan, inverse)
    data = (_blocks(x) * inverse.unsqueeze(-1)).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return data.flatten(-2), exponents.to(torch.uint8)


def dequantize(data: Tensor, exponents: Tensor) -> Tensor:
    """Return the values of :func:`quantize` in float32."""
    scale = (exponents.int() << MANTISSA_BITS).view(torch.float32)
    scale = torch.where(exponents == 0, 2.0**-BIAS, torch.where(exponents == NAN, torch.nan, scale))
    blocks = data.float().unflatten(1, (scale.shape[1], BLOCK))
    return (blocks * scale.unsqueeze(-1)).flatten(1)


def swizzled(exponents: Tensor) -> Tensor:
    """Return exponents (..., rows, blocks) in the order in which the matmul units of sm_100 read them: in tiles of 128
    rows and 4 blocks, each as 32 rows of 16 bytes (cuBLAS, "1D block scaling factors layout"). Missing rows and blocks
    are zero bytes. The result is (..., bytes)."""
    rows, columns = exponents.shape[-2:]
    padded = F.pad(exponents, (0, -columns % TILE_BLOCKS, 0, -rows % TILE_ROWS))
    tiles = padded.unflatten(-1, (-1, TILE_BLOCKS)).unflatten(-3, (-1, 4, 32))
    return tiles.movedim(-2, -4).transpose(-2, -3).flatten(-5)


def in_rows(ordered: Tensor, rows: int, blocks: int) -> Tensor:
    """Return the exponents (rows, blocks) that :func:`swizzled` has put in order, (bytes)."""
    tiles = ordered.view(-(-rows // TILE_ROWS), -(-blocks // TILE_BLOCKS), 32, 4, TILE_BLOCKS)
    return tiles.permute(0, 3, 2, 1, 4).flatten(3).flatten(0, 2)[:rows, :blocks]
