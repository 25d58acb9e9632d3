"""The benchmark of float8's memory, on what can be counted by hand."""

from __future__ import annotations

import float8_memory
import pytest
from benchmark_models import FLAVORS

TOKENS = 8192


@pytest.mark.slow
def test_what_a_layer_keeps_is_what_its_backward_needs() -> None:
    """In eager mode, in units of a tensor of (tokens, dim) in bfloat16."""
    args = FLAVORS["8B-2"]
    unit = 2 * TOKENS * args.dim
    wide, kv = args.ffn_dim / args.dim, args.n_kv_heads / args.n_heads
    # The norms' inputs; queries, keys and values, attention's result; the two factors of SwiGLU.
    common = 2 + 1 + 2 * kv + 1 + 2 * wide
    # The inputs of wq, wk and wv, and of w1 and w3. In bf16 also SwiGLU's product and what silu gave; in float8 wo's
    # input, which attention keeps anyway.
    more = {"bf16": 2 + 2 * wide, "rowwise": (2 + 1) / 2, "rowwise_with_gw_hp": 2}
    for config, of_linears in more.items():
        whole, half = (float8_memory.peak(f"8B-{n}", config, False, "none", TOKENS) for n in (2, 1))
        kept = whole - half - float8_memory.BYTES_PER_PARAMETER * float8_memory.block_parameters("8B-2")
        assert kept == pytest.approx((common + of_linears) * unit, rel=2e-3)  # and sums of rows, of a byte in thousands
