"""The kernels in Triton: amaxes, casts to float8 or int8 into one or both memory layouts, and the scaling of a product.

Matrices are row-major, (M rows, N columns). A cast *by rows* is for a matmul that sums over the columns: it has scales
of rows, and row-major data. A cast *by columns* is for a matmul that sums over the rows: it has scales of columns, and
the data is transposed, because the units need the summed dimension contiguous in both operands. Where a gate is given,
silu(gate) * x is cast instead of x, as in SwiGLU.

The numbers are those of ``numerics.py`` of the format, to the bit (except for SwiGLU's exponential and division). An
amax is passed as the bits of its float32. As integers these are ordered like the magnitudes, with NaN above infinity,
so that an integer maximum, also an atomic one, keeps a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from titanlite.quant.float8.numerics import EPS
from titanlite.quant.int8 import numerics as int8

_EPS = constexpr(EPS)
_STEP_AT_EPS, _STEPS = constexpr(int8.EPS / int8.LARGEST), constexpr(float(int8.LARGEST))
_ROUNDER = constexpr(1.5 * 2**23)  # added to a small float32, it leaves the nearest integer in the low bits of the sum
_MANTISSA, _INFINITY = constexpr(0x007FFFFF), constexpr(0x7F800000)  # bits of a float32
# The layouts of a cast: none, one scale for the tensor, or one scale for each row or column.
NONE, TENSOR, VECTOR = constexpr(-1), constexpr(0), constexpr(1)


@triton.jit
def magnitude_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax_bits, LARGEST: constexpr, POWER_OF_2: constexpr, DTYPE: constexpr):
    if DTYPE.is_int8():
        # Rounding the float64 quotient to float32, as the formula does, gives the correctly rounded float32 quotient.
        amax = amax_bits.to(tl.float32, bitcast=True)
        steps = tl.full(amax.shape, _STEPS, tl.float32)
        scale = tl.where(amax > _EPS, tl.div_rn(amax, steps), _STEP_AT_EPS)
        scale = tl.where(amax_bits < _INFINITY, scale, float("nan"))
    elif POWER_OF_2:
        # In integers, because each program computes hundreds of scales and a float64 division is slow. The exponent of
        # largest / amax is the difference of the two exponents, less one where amax has the larger mantissa. 1e-12 in
        # float32 is exact enough for this.
        finite = tl.maximum(amax_bits, tl.full(amax_bits.shape, _EPS, tl.float32).to(tl.int32, bitcast=True))
        largest = tl.full(amax_bits.shape, LARGEST, tl.float32).to(tl.int32, bitcast=True)
        smaller = ((finite & _MANTISSA) > (largest & _MANTISSA)).to(tl.int32)
        bits = ((largest >> 23) - (finite >> 23) - smaller + 127) << 23
        bits = tl.where(amax_bits < _INFINITY, bits, tl.where(amax_bits == _INFINITY, 0, amax_bits))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True).to(tl.float64)
        floor = tl.full(amax.shape, _EPS, tl.float64)
        scale = (LARGEST / tl.maximum(amax, floor, propagate_nan=tl.PropagateNan.ALL)).to(tl.float32)
    return scale


@triton.jit
def quantize(x, scale, LARGEST: constexpr, DTYPE: constexpr):
    if DTYPE.is_int8():
        # Clamped before it is rounded: the product may then not be fused with the sum, which would round once.
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        rounded = tl.clamp(x.to(tl.float32) * inverse, -LARGEST, LARGEST) + _ROUNDER
        q = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        q = tl.clamp(x.to(tl.float32) * scale, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)
    return q


@triton.jit
def _values(x, gate, offsets, inside, ROUNDED: constexpr = None):
    """Load the values to cast: x, or silu(gate) * x rounded to the dtype of x, as if it had been written. ``ROUNDED``
    is a dtype that x is rounded to before, without a copy of it."""
    values = tl.load(x + offsets, mask=inside, other=0.0)
    if ROUNDED is not None:
        values = values.to(ROUNDED)
    if gate is not None:
        silu = _silu(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32))
        values = (silu * values.to(tl.float32)).to(x.dtype.element_ty)
    return values


@triton.jit
def _dequantized(values, x_scale, rows, M, inside, POWER_OF_2: constexpr):
    """Return the float32 values of rows that were quantized with ``x_scale``, and zeros outside; if it is None, the
    values as they are."""
    if x_scale is not None:
        scale = tl.load(x_scale + rows, mask=rows < M, other=1.0)[:, None]
        if values.dtype.is_int8():
            values = values.to(tl.float32) * scale
        elif POWER_OF_2:  # the reciprocal is exact then, and a division of each element would take longer than the read
            values = values.to(tl.float32) * tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
        else:
            values = tl.div_rn(values.to(tl.float32), tl.broadcast_to(scale, values.shape))
        values = tl.where(inside, values, 0.0)  # of a row whose scale is zero or NaN, zeros became NaN
    return values


@triton.jit
def _silu(gate):
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _scale_of_all(amax, to, LARGEST: constexpr, POWER_OF_2: constexpr, DTYPE: constexpr):
    """Return the scale of the whole tensor, of shape (1,), and store it; every program stores the same value."""
    first = tl.zeros([1], tl.int32)
    scale = _scale(tl.load(amax + first), LARGEST, POWER_OF_2, DTYPE)
    tl.store(to + first, scale)
    return scale


@triton.jit
def tile_of(M, N, BLOCK_M: constexpr, BLOCK_N: constexpr, BACKWARD: constexpr):
    """Return the position of this program's tile, and its rows and columns; ``BACKWARD``: from the last tile on."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0)
    if BACKWARD:
        tile = tl.num_programs(0) - 1 - tile
    down, across = tile // tiles_n, tile % tiles_n
    return down, across, down * BLOCK_M + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def amax_kernel(
    x,
    gate,
    row_amax,
    column_amax,
    M,
    N,
    stride,
    BY_ROWS: constexpr,
    BY_COLUMNS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    x_scale=None,
    POWER_OF_2: constexpr = False,
):
    """Compute the bits of the amaxes of the two layouts, into int32 zeros. Where both layouts have one scale for the
    tensor, only row_amax is written. Reads x once.

    Args:
        x_scale: the scales of the rows of x, where x is quantized already; the amaxes are those of its values.
        POWER_OF_2: these scales are powers of two.
    """
    _, _, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, False)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    values = _values(x, gate, rows.to(tl.int64)[:, None] * stride + columns[None, :], inside)
    bits = magnitude_bits(_dequantized(values, x_scale, rows, M, inside, POWER_OF_2))
    if BY_ROWS == VECTOR:
        tl.atomic_max(row_amax + rows, tl.max(bits, 1), mask=rows < M, sem="relaxed")
    elif BY_ROWS == TENSOR:
        tl.atomic_max(row_amax, tl.max(tl.max(bits, 1), 0), sem="relaxed")
    if BY_COLUMNS == VECTOR:
        tl.atomic_max(column_amax + columns, tl.max(bits, 0), mask=columns < N, sem="relaxed")
    elif BY_COLUMNS == TENSOR and BY_ROWS != TENSOR:
        tl.atomic_max(column_amax, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit
def cast_kernel(
    x,
    gate,
    row_amax,
    column_amax,
    by_rows,
    row_scale,
    by_columns,
    column_scale,
    M,
    N,
    stride,
    LARGEST: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BY_ROWS: constexpr,
    BY_COLUMNS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    ROUNDED: constexpr = None,
    x_scale=None,
):
    """Cast x to float8, to by_rows (M, N) and by_columns (N, M), each with scales from the bits of the amaxes. Reads x
    once, the last tiles first: amax_kernel has left them in the cache. ``x_scale`` is as for amax_kernel: its values
    are cast."""
    down, across, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    values = _values(x, gate, rows.to(tl.int64)[:, None] * stride + columns[None, :], inside, ROUNDED)
    values = _dequantized(values, x_scale, rows, M, inside, POWER_OF_2)
    if BY_ROWS == VECTOR:
        scale = _scale(tl.load(row_amax + rows, mask=rows < M, other=0), LARGEST, POWER_OF_2, DTYPE)
        if across == 0:
            tl.store(row_scale + rows, scale, mask=rows < M)
        q = quantize(values, scale[:, None], LARGEST, DTYPE)
    elif BY_ROWS == TENSOR:
        q = quantize(values, _scale_of_all(row_amax, row_scale, LARGEST, POWER_OF_2, DTYPE)[:, None], LARGEST, DTYPE)
    if BY_ROWS != NONE:
        tl.store(by_rows + rows.to(tl.int64)[:, None] * N + columns[None, :], q, mask=inside)
    if BY_COLUMNS == VECTOR or (BY_COLUMNS == TENSOR and BY_ROWS != TENSOR):
        scale = _scale_of_columns(column_amax, column_scale, columns, N, down, BY_COLUMNS, LARGEST, POWER_OF_2, DTYPE)
        q = quantize(values, scale[None, :], LARGEST, DTYPE)
    elif BY_COLUMNS == TENSOR:  # q has this scale already
        _scale_of_all(column_amax, column_scale, LARGEST, POWER_OF_2, DTYPE)
    if BY_COLUMNS != NONE:
        store_transposed(by_columns, q, rows, columns, M, N)


@triton.jit
def _scale_of_columns(
    amax,
    to,
    columns,
    N,
    down,
    LAYOUT: constexpr,
    LARGEST: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
):
    """Return the scale of each column, or of the whole tensor in shape (1,), and store it."""
    if LAYOUT == VECTOR:
        scale = _scale(tl.load(amax + columns, mask=columns < N, other=0), LARGEST, POWER_OF_2, DTYPE)
        if down == 0:
            tl.store(to + columns, scale, mask=columns < N)
    else:
        scale = _scale_of_all(amax, to, LARGEST, POWER_OF_2, DTYPE)
    return scale


@triton.jit
def store_transposed(to, q, rows, columns, M, N):
    inside = (columns < N)[:, None] & (rows < M)[None, :]
    tl.store(to + columns.to(tl.int64)[:, None] * M + rows[None, :], tl.trans(q), mask=inside)


@triton.jit
def row_cast_kernel(
    x,
    gate,
    by_rows,
    row_scale,
    N,
    stride,
    LARGEST: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BLOCK_N: constexpr,
    ROUNDED: constexpr = None,
):
    """Cast one row, of at most BLOCK_N columns, by rows. Reads x once: the amax is computed here."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < N
    values = _values(x, gate, row * stride + columns, inside, ROUNDED)
    scale = _scale(tl.max(magnitude_bits(values), 0, keep_dims=True), LARGEST, POWER_OF_2, DTYPE)
    tl.store(by_rows + row * N + columns, quantize(values, scale, LARGEST, DTYPE), mask=inside)
    tl.store(row_scale + row + tl.zeros([1], tl.int32), scale)


@triton.jit
def swiglu_backward_kernel(
    grad,
    gate,
    up,
    column_amax,
    grad_gate,
    product,
    column_scale,
    M,
    N,
    stride,
    LARGEST: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BY_COLUMNS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """Compute the gradients of silu(gate) * up, and unless ``product`` is None recompute the product: cast by columns,
    or with BY_COLUMNS = NONE not cast. The gradient of up overwrites grad. All are (M, N) and row-major; ``stride`` is
    that of the rows of gate and up. Reads each once."""
    down, _, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    input_offsets = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    g = tl.load(gate + input_offsets, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + input_offsets, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = _silu(g)  # the same bits as in forward, so that the product fits the scale computed there
    g_grad = out * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + offsets, g_grad.to(gate.dtype.element_ty), mask=inside)
    tl.store(grad + offsets, (out * silu).to(up.dtype.element_ty), mask=inside)
    if product is not None:
        values = (silu * u).to(up.dtype.element_ty)
        if BY_COLUMNS == NONE:
            tl.store(product + offsets, values, mask=inside)
        else:
            scale = _scale_of_columns(
                column_amax, column_scale, columns, N, down, BY_COLUMNS, LARGEST, POWER_OF_2, DTYPE
            )
            store_transposed(product, quantize(values, scale[None, :], LARGEST, DTYPE), rows, columns, M, N)


@triton.jit
def rescale_kernel(
    product,
    row_scale,
    column_scale,
    out,
    M,
    N,
    ROW_STEP: constexpr,
    COLUMN_STEP: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """Divide the unscaled product of two operands by their scales: those of rows and of columns, or with step 0 one of
    the whole operand."""
    _, _, rows, columns = tile_of(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    row = tl.load(row_scale + rows * ROW_STEP, mask=rows < M, other=1.0)
    column = tl.load(column_scale + columns * COLUMN_STEP, mask=columns < N, other=1.0)
    row = tl.div_rn(tl.full(row.shape, 1.0, tl.float32), row)
    column = tl.div_rn(tl.full(column.shape, 1.0, tl.float32), column)
    values = tl.load(product + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, (values * row[:, None] * column[None, :]).to(out.dtype.element_ty), mask=inside)
