"""Casts by group in Triton: each column of each group of rows by itself, transposed, as the sum over the rows of a
group needs it.

The rows of x are read where each group is filled up with zeros to whole units of rows (``titanlite.quant.groups``), and
no copy of them is made. ``row_of`` has the row of x for each of these places, -1 for a zero; ``group_of`` has the group
of each unit. The numbers are those of the plain operations, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from titanlite.quant.kernels.triton_kernels import magnitude_bits, quantize, store_transposed, tile_of


@triton.jit
def rows_at(x, row_of, rows, columns, M, N, stride):
    """Load a tile of the filled-up rows, of which there are M."""
    row = tl.load(row_of + rows, mask=rows < M, other=-1).to(tl.int64)
    inside = (row >= 0)[:, None] & (columns < N)[None, :]
    return tl.load(x + row[:, None] * stride + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _groups_at(group_of, down, M, UNIT: constexpr, BLOCK_M: constexpr):
    """Load the groups of the units of a tile; those after the last unit count as the last one's."""
    units = down * (BLOCK_M // UNIT) + tl.arange(0, BLOCK_M // UNIT)
    return tl.load(group_of + tl.minimum(units, M // UNIT - 1)).to(tl.int64)


@triton.jit
def group_amax_kernel(
    x,
    row_of,
    group_of,
    amax,
    M,
    N,
    stride,
    UNIT: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """Compute the bits of the amax of each column of each group, into int32 zeros (groups, N). Reads x once."""
    down, _, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, False)
    bits = magnitude_bits(rows_at(x, row_of, rows, columns, M, N, stride))
    groups = _groups_at(group_of, down, M, UNIT, BLOCK_M)
    first = tl.min(groups, 0)
    if first == tl.max(groups, 0):  # as for most tiles: one atomic operation for each column
        tl.atomic_max(amax + first * N + columns, tl.max(bits, 0), mask=columns < N, sem="relaxed")
    else:
        of_units = tl.max(tl.reshape(bits, (BLOCK_M // UNIT, UNIT, BLOCK_N)), 1)
        inside = (groups >= 0)[:, None] & (columns < N)[None, :]
        tl.atomic_max(amax + groups[:, None] * N + columns[None, :], of_units, mask=inside, sem="relaxed")


@triton.jit
def group_cast_kernel(
    x,
    row_of,
    group_of,
    scale,
    to,
    M,
    N,
    stride,
    LARGEST: constexpr,
    DTYPE: constexpr,
    UNIT: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """Cast the M filled-up rows with the scales (groups, N), to (N, M). Reads x once, the last tiles first:
    group_amax_kernel has left them in the cache."""
    down, _, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, True)
    values = rows_at(x, row_of, rows, columns, M, N, stride)
    groups = _groups_at(group_of, down, M, UNIT, BLOCK_M)
    inside = (groups >= 0)[:, None] & (columns < N)[None, :]
    scales = tl.load(scale + groups[:, None] * N + columns[None, :], mask=inside, other=1.0)
    units = tl.reshape(values, (BLOCK_M // UNIT, UNIT, BLOCK_N))
    q = tl.reshape(quantize(units, scales[:, None, :], LARGEST, DTYPE), (BLOCK_M, BLOCK_N))
    store_transposed(to, q, rows, columns, M, N)
