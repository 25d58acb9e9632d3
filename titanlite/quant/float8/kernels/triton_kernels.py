"""The kernels in Triton: amaxes, casts into one or both memory layouts, and the scaling of a product.

Matrices are row-major, (rows, columns), of M and N elements. A cast *by rows* gives what a matmul contracts along the
columns: scales of rows and row-major data. One *by columns* gives what a matmul contracts along the rows: scales of
columns, and the data transposed, since float8 units take both operands with what they sum over lying together. Where
there is a gate, it is silu(gate) * x that is cast, as in SwiGLU.

Numbers are those of :mod:`titanlite.quant.float8.numerics`, to the bit (SwiGLU's but for exponential and division). An
amax travels as the bits of its float32, which order as magnitudes do, NaN above infinity: integer maxima, and thereby
atomic ones, then keep a NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr

from titanlite.quant.float8.numerics import EPS

_EPS = constexpr(EPS)
_MANTISSA, _INFINITY = constexpr(0x007FFFFF), constexpr(0x7F800000)  # bits of a float32
# The scales of one layout of a cast, and the steps between their addresses from row to row, or column to column.
NONE, TENSOR, VECTOR = constexpr(-1), constexpr(0), constexpr(1)


@triton.jit
def _magnitude_bits(x):
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _scale(amax_bits, FP8_MAX: constexpr, POWER_OF_2: constexpr):
    if POWER_OF_2:
        # In integers, since each program makes hundreds of them and a division in float64 takes long. The exponent of
        # fp8_max / amax is the difference of theirs, less one where amax has the larger mantissa; 1e-12 in float32 is
        # exact enough for that.
        finite = tl.maximum(amax_bits, tl.full(amax_bits.shape, _EPS, tl.float32).to(tl.int32, bitcast=True))
        largest = tl.full(amax_bits.shape, FP8_MAX, tl.float32).to(tl.int32, bitcast=True)
        smaller = ((finite & _MANTISSA) > (largest & _MANTISSA)).to(tl.int32)
        bits = ((largest >> 23) - (finite >> 23) - smaller + 127) << 23
        bits = tl.where(amax_bits < _INFINITY, bits, tl.where(amax_bits == _INFINITY, 0, amax_bits))
        scale = bits.to(tl.float32, bitcast=True)
    else:
        amax = amax_bits.to(tl.float32, bitcast=True).to(tl.float64)
        floor = tl.full(amax.shape, _EPS, tl.float64)
        scale = (FP8_MAX / tl.maximum(amax, floor, propagate_nan=tl.PropagateNan.ALL)).to(tl.float32)
    return scale


@triton.jit
def _quantize(x, scale, FP8_MAX: constexpr, DTYPE: constexpr):
    return tl.clamp(x.to(tl.float32) * scale, -FP8_MAX, FP8_MAX, propagate_nan=tl.PropagateNan.ALL).to(DTYPE)


@triton.jit
def _values(x, gate, offsets, inside):
    """What is cast: x, or the product of SwiGLU, rounded to the dtype of x as if it had been written."""
    values = tl.load(x + offsets, mask=inside, other=0.0)
    if gate is not None:
        silu = _silu(tl.load(gate + offsets, mask=inside, other=0.0).to(tl.float32))
        values = (silu * values.to(tl.float32)).to(x.dtype.element_ty)
    return values


@triton.jit
def _silu(gate):
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def _scale_of_all(amax, to, FP8_MAX: constexpr, POWER_OF_2: constexpr):
    """The scale of the tensor, of shape (1,); stored by every program, the same by each."""
    only = tl.zeros([1], tl.int32)
    scale = _scale(tl.load(amax + only), FP8_MAX, POWER_OF_2)
    tl.store(to + only, scale)
    return scale


@triton.jit
def _tile(M, N, BLOCK_M: constexpr, BLOCK_N: constexpr, BACKWARD: constexpr):
    """The place and the rows and columns of this program's tile; ``BACKWARD``: from the last tile to the first."""
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
):
    """The bits of the amaxes that the two layouts want (of all elements for both: in row_amax), into int32 zeros. Reads
    x once."""
    _, _, rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, False)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    values = _values(x, gate, rows.to(tl.int64)[:, None] * stride + columns[None, :], inside)
    bits = _magnitude_bits(values)
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
    FP8_MAX: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BY_ROWS: constexpr,
    BY_COLUMNS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """x in float8: by_rows (M, N) and by_columns (N, M), each with its scales, from the bits of the amaxes. Reads x
    once; last tiles first, which the kernel of the amaxes has left in the cache."""
    down, across, rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    values = _values(x, gate, rows.to(tl.int64)[:, None] * stride + columns[None, :], inside)
    if BY_ROWS == VECTOR:
        scale = _scale(tl.load(row_amax + rows, mask=rows < M, other=0), FP8_MAX, POWER_OF_2)
        if across == 0:
            tl.store(row_scale + rows, scale, mask=rows < M)
        q = _quantize(values, scale[:, None], FP8_MAX, DTYPE)
    elif BY_ROWS == TENSOR:
        q = _quantize(values, _scale_of_all(row_amax, row_scale, FP8_MAX, POWER_OF_2)[:, None], FP8_MAX, DTYPE)
    if BY_ROWS != NONE:
        tl.store(by_rows + rows.to(tl.int64)[:, None] * N + columns[None, :], q, mask=inside)
    if BY_COLUMNS == VECTOR or (BY_COLUMNS == TENSOR and BY_ROWS != TENSOR):
        scale = _scale_of_columns(column_amax, column_scale, columns, N, down, FP8_MAX, POWER_OF_2, BY_COLUMNS)
        q = _quantize(values, scale[None, :], FP8_MAX, DTYPE)
    elif BY_COLUMNS == TENSOR:  # q is as it should be
        _scale_of_all(column_amax, column_scale, FP8_MAX, POWER_OF_2)
    if BY_COLUMNS != NONE:
        _store_transposed(by_columns, q, rows, columns, M, N)


@triton.jit
def _scale_of_columns(amax, to, columns, N, down, FP8_MAX: constexpr, POWER_OF_2: constexpr, HOW: constexpr):
    """Of each column, or of all in shape (1,); stored."""
    if HOW == VECTOR:
        scale = _scale(tl.load(amax + columns, mask=columns < N, other=0), FP8_MAX, POWER_OF_2)
        if down == 0:
            tl.store(to + columns, scale, mask=columns < N)
    else:
        scale = _scale_of_all(amax, to, FP8_MAX, POWER_OF_2)
    return scale


@triton.jit
def _store_transposed(to, q, rows, columns, M, N):
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
    FP8_MAX: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BLOCK_N: constexpr,
):
    """One row, of at most BLOCK_N columns, by rows. Reads x once: no amax comes from elsewhere."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_N)
    inside = columns < N
    values = _values(x, gate, row * stride + columns, inside)
    scale = _scale(tl.max(_magnitude_bits(values), 0, keep_dims=True), FP8_MAX, POWER_OF_2)
    tl.store(by_rows + row * N + columns, _quantize(values, scale, FP8_MAX, DTYPE), mask=inside)
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
    FP8_MAX: constexpr,
    POWER_OF_2: constexpr,
    DTYPE: constexpr,
    BY_COLUMNS: constexpr,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
):
    """The gradients of silu(gate) * up, that of up in grad, where its own was; and, unless ``product`` is None, the
    product, as it is, or by columns. All of them (M, N) and row-major, between the rows of gate and up a stride. Reads
    each once."""
    down, _, rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    of_factors = rows.to(tl.int64)[:, None] * stride + columns[None, :]
    g = tl.load(gate + of_factors, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + of_factors, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = _silu(g)  # as in forward to the bit, so that the copy of the product fits its scale
    grad_of_gate = out * u * sigmoid * (1.0 + g * (1.0 - sigmoid))
    tl.store(grad_gate + offsets, grad_of_gate.to(gate.dtype.element_ty), mask=inside)
    tl.store(grad + offsets, (out * silu).to(up.dtype.element_ty), mask=inside)
    if product is not None:
        values = (silu * u).to(up.dtype.element_ty)
        if BY_COLUMNS == NONE:
            tl.store(product + offsets, values, mask=inside)
        else:
            scale = _scale_of_columns(column_amax, column_scale, columns, N, down, FP8_MAX, POWER_OF_2, BY_COLUMNS)
            _store_transposed(product, _quantize(values, scale[None, :], FP8_MAX, DTYPE), rows, columns, M, N)


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
    """The product of two operands, divided by their scales, which it was computed without: of rows and columns, or with
    step 0 of the whole operand."""
    _, _, rows, columns = _tile(M, N, BLOCK_M, BLOCK_N, True)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * N + columns[None, :]
    of_rows = tl.load(row_scale + rows * ROW_STEP, mask=rows < M, other=1.0)
    of_columns = tl.load(column_scale + columns * COLUMN_STEP, mask=columns < N, other=1.0)
    of_rows = tl.div_rn(tl.full(of_rows.shape, 1.0, tl.float32), of_rows)
    of_columns = tl.div_rn(tl.full(of_columns.shape, 1.0, tl.float32), of_columns)
    values = tl.load(product + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, (values * of_rows[:, None] * of_columns[None, :]).to(out.dtype.element_ty), mask=inside)
