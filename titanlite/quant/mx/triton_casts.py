"""The cast to mxfp8 in Triton: along rows, along columns, or both, in one pass.

The numbers are those of :mod:`titanlite.quant.mx.numerics`, to the bit. The exponents of the scales are stored as
``swizzled`` there has them: a program casts as many rows and columns as one of its tiles covers. Those of rows in
groups are stored in the order of the blocks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from titanlite.quant.kernels.triton_groups import rows_at
from titanlite.quant.kernels.triton_kernels import magnitude_bits, tile_of
from titanlite.quant.mx import numerics

_BLOCK, _LARGEST = constexpr(numerics.BLOCK), constexpr(numerics.LARGEST)
_INFINITY, _NAN = constexpr(0x7F800000), constexpr(numerics.NAN)  # the bits of a float32; an exponent
_MANTISSA_BITS, _MANTISSA = constexpr(numerics.MANTISSA_BITS), constexpr(numerics.MANTISSA)
_EXPONENT_OF_LARGEST = constexpr(numerics.EXPONENT_OF_LARGEST)
_MANTISSA_OF_LARGEST = constexpr(numerics.MANTISSA_OF_LARGEST)
_TWICE_BIAS = constexpr(2 * numerics.BIAS)
_SMALLEST, _NAN_BITS = constexpr(0x00400000), constexpr(0x7FC00000)  # bits of a float32: 2**-127, NaN


@triton.jit
def _exponents(amax_bits, RCEIL: constexpr):
    exponents = (amax_bits >> _MANTISSA_BITS) - _EXPONENT_OF_LARGEST
    if RCEIL:
        exponents += ((amax_bits & _MANTISSA) > _MANTISSA_OF_LARGEST).to(tl.int32)
    return tl.where(amax_bits < _INFINITY, tl.maximum(exponents, 0), _NAN)


@triton.jit
def _quantize(blocks, exponents):
    inverse = ((-exponents + _TWICE_BIAS) << _MANTISSA_BITS).to(tl.float32, bitcast=True)
    inverse = tl.where(exponents == _NAN, float("nan"), inverse)
    scaled = blocks.to(tl.float32) * inverse
    return tl.clamp(scaled, -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _dequantized(values, exponents, rows, across, M, N, SIZE: constexpr):
    """Return the float32 values of a tile whose blocks along rows have these exponents, (M, N / 32)."""
    blocks = across * (SIZE // _BLOCK) + tl.arange(0, SIZE // _BLOCK)
    inside = (rows < M)[:, None] & (blocks < N // _BLOCK)[None, :]
    exponent = tl.load(exponents + rows.to(tl.int64)[:, None] * (N // _BLOCK) + blocks[None, :], mask=inside, other=0)
    bits = exponent.to(tl.int32) << _MANTISSA_BITS
    bits = tl.where(exponent == 0, _SMALLEST, tl.where(exponent == _NAN, _NAN_BITS, bits))
    scaled = tl.reshape(values.to(tl.float32), (SIZE, SIZE // _BLOCK, _BLOCK))
    return tl.reshape(scaled * bits.to(tl.float32, bitcast=True)[:, :, None], (SIZE, SIZE))


@triton.jit
def _cast(
    values,
    to,
    exponents_to,
    rows,
    columns,
    M,
    N,
    down,
    across,
    RCEIL: constexpr,
    SWIZZLED: constexpr,
    SIZE: constexpr,
):
    """Cast tile (down, across) of a matrix (M, N) in blocks along its rows."""
    blocks = tl.reshape(values, (SIZE, SIZE // _BLOCK, _BLOCK))
    exponents = _exponents(tl.max(magnitude_bits(blocks), 2), RCEIL)
    padded = tl.cdiv(N, _BLOCK) * _BLOCK
    inside = (rows < M)[:, None] & (columns < padded)[None, :]
    q = tl.reshape(_quantize(blocks, exponents[:, :, None]), (SIZE, SIZE))
    tl.store(to + rows.to(tl.int64)[:, None] * padded + columns[None, :], q, mask=inside)
    if SWIZZLED:  # the exponents of 128 rows and 4 blocks are one tile of those that are stored
        order = tl.permute(tl.reshape(exponents.to(tl.uint8), (4, 32, 4)), (1, 0, 2))
        first = (down * tl.cdiv(N, SIZE) + across).to(tl.int64) * 512
        tl.store(exponents_to + first + tl.arange(0, 512), tl.reshape(order, (512,)))
    else:
        blocks = across * (SIZE // _BLOCK) + tl.arange(0, SIZE // _BLOCK)
        inside = (rows < M)[:, None] & (blocks < padded // _BLOCK)[None, :]
        places = rows.to(tl.int64)[:, None] * (padded // _BLOCK) + blocks[None, :]
        tl.store(exponents_to + places, exponents.to(tl.uint8), mask=inside)


@triton.jit
def cast_kernel(
    x,
    row_of,
    by_rows,
    row_exponents,
    by_columns,
    column_exponents,
    M,
    N,
    stride,
    RCEIL: constexpr,
    BY_ROWS: constexpr,
    BY_COLUMNS: constexpr,
    SWIZZLED: constexpr,
    SIZE: constexpr,
    ROUNDED: constexpr = None,
    x_exponents=None,
):
    """Cast x (M, N), whose rows are contiguous, to by_rows (M, N) in blocks along its rows, and to by_columns (N, M) in
    blocks along its columns. Blocks at the end are filled up with zeros. Reads x once.

    Args:
        row_of: the row of x in the place of each of the M rows, -1 for zeros; None: each is in its own.
        SIZE: of the tile of a program, in rows and columns: 128, as the exponents are stored.
        ROUNDED: a dtype that x is rounded to before, without a copy of it.
        x_exponents: (M, N / 32), where x is in blocks along its rows already: its values are cast.
    """
    down, across, rows, columns = tile_of(M, N, SIZE, SIZE, False)
    if row_of is None:
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        values = tl.load(x + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    else:
        values = rows_at(x, row_of, rows, columns, M, N, stride)
    if ROUNDED is not None:
        values = values.to(ROUNDED)
    if x_exponents is not None:
        values = _dequantized(values, x_exponents, rows, across, M, N, SIZE)
    if BY_ROWS:
        _cast(values, by_rows, row_exponents, rows, columns, M, N, down, across, RCEIL, SWIZZLED, SIZE)
    if BY_COLUMNS:
        values = tl.trans(values)
        _cast(values, by_columns, column_exponents, columns, rows, N, M, across, down, RCEIL, SWIZZLED, SIZE)
