"""Attention, with a slot for the function that computes it from queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers.init import Init
from titanlite.models.layers.rotary import apply_rope


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the causal attention of q [batch, heads, seq_len, head_dim] to k and v [batch, kv_heads, seq_len,
    head_dim]: no position sees a later one."""
    # enable_gqa also where the numbers of heads are equal: the compiler may treat them as symbols.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class AttentionSlot(nn.Module):
    """A module that computes attention.

    Attributes:
        core: a slot for a function ``(q, k, v) -> out``, by default :func:`causal_attention`. Context parallelism, a
            cache of keys and values and the like replace it.
    """

    core: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.core = causal_attention


class Attention(AttentionSlot):
    """Causal grouped-query attention with rotary embeddings.

    Args:
        dim: the features of the hidden states.
        heads: the number of heads of queries.
        kv_heads: the number of heads of keys and values, a divisor of ``heads``.
        head_dim: the features of each head.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """Map ``x`` [batch, seq_len, dim] to [batch, seq_len, dim]. ``rope``: [2, seq_len, head_dim]."""
        batch, seq_len, _ = x.shape
        # -1 instead of the number of heads: under tensor parallelism each device has a share of them.
        q = apply_rope(self.wq(x).view(batch, seq_len, -1, self.head_dim), rope)
        k = apply_rope(self.wk(x).view(batch, seq_len, -1, self.head_dim), rope)
        v = self.wv(x).view(batch, seq_len, -1, self.head_dim)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(out.transpose(1, 2).reshape(batch, seq_len, -1))  # type: ignore[no-any-return]

    def init_weights(self, init: Init, out_std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init.trunc_normal(linear.weight, std=0.02)
        init.trunc_normal(self.wo.weight, std=out_std)
