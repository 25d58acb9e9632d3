"""Attention with a slot for how queries meet keys and values."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers.init import Init
from titanlite.models.layers.rotary import apply_rope


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of q [batch, heads, seq_len, head_dim] to k and v [batch, kv_heads, seq_len, head_dim], in
    which no position sees a later one."""
    # Grouped without asking whether it is: the compiler may hold the numbers of heads as symbols.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class AttentionSlot(nn.Module):
    """A module that attends.

    Attributes:
        core: a slot, ``(q, k, v) -> out`` as :func:`causal_attention`, which is there at first. Context parallelism, a
            cache of keys and values and the like put theirs there.
    """

    core: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.core = causal_attention


class Attention(AttentionSlot):
    """Causal grouped-query attention with rotary embeddings.

    Args:
        dim: of the hidden states.
        heads: of queries.
        kv_heads: of keys and values, a divisor of ``heads``.
        head_dim: of each head.
    """

    def __init__(self, dim: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.wq = nn.Linear(dim, heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """``x`` [batch, seq_len, dim] and ``rope`` [2, seq_len, head_dim] -> [batch, seq_len, dim]."""
        batch, seq_len, _ = x.shape
        # -1, not the number of heads: under tensor parallelism each device has its share of them.
        q = apply_rope(self.wq(x).view(batch, seq_len, -1, self.head_dim), rope)
        k = apply_rope(self.wk(x).view(batch, seq_len, -1, self.head_dim), rope)
        v = self.wv(x).view(batch, seq_len, -1, self.head_dim)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(out.transpose(1, 2).reshape(batch, seq_len, -1))  # type: ignore[no-any-return]

    def init_weights(self, init: Init, out_std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init.trunc_normal(linear.weight, std=0.02)
        init.trunc_normal(self.wo.weight, std=out_std)
