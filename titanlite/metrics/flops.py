"""Model FLOPs, counted as the PaLM paper does (Chowdhery et al. 2022, appendix B)."""

from __future__ import annotations

from titanlite.models.layers import ModelSize


def flops_per_token(size: ModelSize, seq_len: int) -> int:
    """Return the floating-point operations of forward and backward per token: ``6 (N - N_embedding) + 12 L H Q T``.

    Each weight multiplies and adds once in forward and twice in backward; attention's two matmuls do the same over all
    ``seq_len`` positions. Causal attention needs half of these; as in the paper and in torchtitan, no discount is made,
    and recomputation is not counted. Nor is there one for a sliding window, whose mask spans all positions. Of experts,
    N counts those that a token uses.
    """
    dense = 6 * (size.params - size.unused_params - size.embedding_params)
    return dense + 12 * size.layers * size.heads * size.head_dim * seq_len
