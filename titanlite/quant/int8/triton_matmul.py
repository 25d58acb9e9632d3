"""The matmul of int8 operands in Triton, which multiplies the sums by the scales before it writes them.

The sums of the products are exact, and what follows is that of :mod:`titanlite.quant.int8.numerics`, to the bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language import constexpr


@triton.jit
def matmul_kernel(
    a,
    b,
    a_scale,
    b_scale,
    out,
    M,
    N,
    K,
    a_stride,
    b_stride,
    BLOCK_M: constexpr,
    BLOCK_N: constexpr,
    BLOCK_K: constexpr,
    GROUP: constexpr,
    WHOLE: constexpr,
):
    """Multiply a (M, K) by the transpose of b (N, K), both row-major, and by the scales of their rows.

    Args:
        GROUP: programs that follow each other compute this many tiles of rows, and so find their operands in the cache.
        WHOLE: K is a multiple of BLOCK_K.
    """
    program, across, down = tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M)
    first = program // (GROUP * across) * GROUP
    height = tl.minimum(down - first, GROUP)
    within = program % (GROUP * across)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = within // height * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    # Rows beyond the last one are computed from the last one, and not written.
    a += tl.minimum(rows, M - 1).to(tl.int64)[:, None] * a_stride + depth[None, :]
    b += tl.minimum(columns, N - 1).to(tl.int64)[:, None] * b_stride + depth[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in range(0, K, BLOCK_K):
        if WHOLE:
            left, right = tl.load(a), tl.load(b)
        else:
            inside = (depth < K - start)[None, :]
            left, right = tl.load(a, mask=inside, other=0), tl.load(b, mask=inside, other=0)
        total = tl.dot(left, tl.trans(right), total, out_dtype=tl.int32)
        a += BLOCK_K
        b += BLOCK_K
    by_row = tl.load(a_scale + rows, mask=rows < M, other=0.0)[:, None]
    by_column = tl.load(b_scale + columns, mask=columns < N, other=0.0)[None, :]
    values = (total.to(tl.float32) * by_column * by_row).to(out.dtype.element_ty)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    tl.store(out + rows.to(tl.int64)[:, None] * N + columns[None, :], values, mask=inside)
