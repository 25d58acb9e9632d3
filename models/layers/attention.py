"""Attention, with a slot for the function that computes it from queries, keys and values."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.models.layers.init import Init
from titanlite.models.layers.rotary import apply_rope


class Core(Protocol):
    """The type of :func:`causal_attention`, and of what takes its place in a slot."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Any = None) -> Tensor: ...


def visible(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Return which keys each query sees, bool [queries, keys], where the queries are the last of the keys' positions.

    Args:
        window: the number of positions that a query sees, its own and the ones before it; None: all.
    """
    row = torch.arange(keys - queries, keys, device=device)[:, None]
    column = torch.arange(keys, device=device)
    seen = column <= row
    return seen if window is None else seen & (column > row - window)


def document_mask(starts: Tensor, window: int | None = None) -> Tensor:
    """Return which positions each position sees, bool [batch, 1, seq_len, seq_len]: those of its document.

    Args:
        starts: the position at which the document of each token begins, int64 [batch, seq_len].
        window: as of :func:`visible`.
    """
    seq_len = starts.shape[1]
    keys = torch.arange(seq_len, device=starts.device)
    return (visible(seq_len, seq_len, window, starts.device) & (keys >= starts[:, :, None])).unsqueeze(1)


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None
) -> Tensor:
    """Return the causal attention of q [batch, heads, seq_len, head_dim] to k and v [batch, kv_heads, seq_len,
    head_dim]: no position sees a later one, nor one that is ``window`` or more positions before it (None: no limit).
    Scores are scaled by ``head_dim ** -0.5``. Where the heads of values have another size, there are as many of keys as
    of queries.

    Args:
        documents: a :func:`document_mask` with the same window; None: each sequence is one document.
    """
    features = v.shape[-1]
    if features < q.shape[-1] and q.device.type == "cpu" and q.shape[1] == k.shape[1]:
        # The CPU's flash kernel needs heads of values as wide as those of queries. Otherwise torch stores all scores.
        v = F.pad(v, (0, q.shape[-1] - features))
    out = _attend(q, k, v, window, documents)
    return out if out.shape[-1] == features else out[..., :features]


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None, documents: Tensor | None) -> Tensor:
    if documents is None and (window is None or window >= q.shape[2]):
        if v.shape[-1] != q.shape[-1]:  # of the kernels of GPUs that take this, few take enable_gqa
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        # enable_gqa also where the numbers of heads are equal: the compiler may treat them as symbols.
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    mask = visible(q.shape[2], k.shape[2], window, q.device) if documents is None else documents
    # A copy for each head of queries: of the kernels that take a mask, none takes fewer heads of keys.
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class AttentionSlot(nn.Module):
    """A module that computes attention.

    Attributes:
        core: a slot for a function ``(q, k, v, window, documents) -> out``, by default :func:`causal_attention`.
            Context parallelism, a cache of keys and values and the like replace it. A core that cannot compute a window
            raises an error. ``documents`` is passed only if a sequence holds several: it is what the slot
            ``mask_of`` of the decoder returned for them.
    """

    core: Core

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
        bias: add a bias to queries, keys and values.
        norm_eps: normalize each head of queries and keys before its rotation, with this epsilon; None: do not.
        window: the number of positions that each position sees; None: all before it.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        bias: bool = False,
        norm_eps: float | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.wq = nn.Linear(dim, heads * head_dim, bias=bias)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=bias)
        self.wo = nn.Linear(heads * head_dim, dim, bias=False)
        self.q_norm, self.k_norm = (
            None if norm_eps is None else nn.RMSNorm(head_dim, eps=norm_eps) for _ in ("queries", "keys")
        )

    def forward(self, x: Tensor, rope: Tensor, documents: Any = None) -> Tensor:
        """Map ``x`` [batch, seq_len, dim] to [batch, seq_len, dim].

        Args:
            rope: [2, seq_len, rotary_dim], or [2, batch, seq_len, rotary_dim] if positions differ between sequences.
            documents: for the core; None: each sequence is one document.
        """
        batch, seq_len, _ = x.shape
        # -1 instead of the number of heads: under tensor parallelism each device has a share of them.
        q, k, v = (linear(x).view(batch, seq_len, -1, self.head_dim) for linear in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        parts = {} if documents is None else {"documents": documents}
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window=self.window, **parts)
        return self.wo(out.transpose(1, 2).reshape(batch, seq_len, -1))  # type: ignore[no-any-return]

    def init_weights(self, init: Init, out_std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init.trunc_normal(linear.weight, std=0.02)
            if linear.bias is not None:
                init.zeros(linear.bias)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                init.ones(norm.weight)
        init.trunc_normal(self.wo.weight, std=out_std)
