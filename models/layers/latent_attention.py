"""Multi-head latent attention (DeepSeek-AI, "DeepSeek-V2", 2024): keys and values are made of a short vector for each
token, the latent."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.models.layers.attention import AttentionSlot
from titanlite.models.layers.init import Init
from titanlite.models.layers.rotary import apply_rope


@dataclass(frozen=True)
class LatentArgs:
    """The sizes of latent attention.

    Attributes:
        kv_rank: the features of a latent, without the rotated ones.
        q_rank: the features that queries are made of; None: they are made of the hidden states.
        nope_dim: the features of a head of queries and keys that are not rotated.
        rope_dim: the rotated ones, which all heads of keys share.
        value_dim: the features of a head of values.
    """

    kv_rank: int
    q_rank: int | None = None
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128

    @property
    def head_dim(self) -> int:
        """The features of a head of queries and keys."""
        return self.nope_dim + self.rope_dim

    @property
    def kv_features(self) -> int:
        """The features of a latent, with the rotated ones."""
        return self.kv_rank + self.rope_dim


def _unchanged(x: Tensor) -> Tensor:
    return x


class LatentAttention(AttentionSlot):
    """Causal attention whose keys and values are projections of latents.

    Args:
        dim: the features of the hidden states.
        heads: the number of heads.
        norm_eps: the epsilon of the norms of latents.
        score_factor: the factor of the scores, beside ``head_dim ** -0.5``.

    Attributes:
        latents: a slot for a cache: a function of the latents of new tokens [batch, 1, seq_len, kv_rank + rope_dim],
            normalized and rotated, that returns those of all tokens so far; None: there are no others.
        for_heads: a slot for a function that returns what the heads of this process take of features that all heads
            share.
    """

    latents: Callable[[Tensor], Tensor] | None
    for_heads: Callable[[Tensor], Tensor]

    def __init__(self, dim: int, heads: int, args: LatentArgs, *, norm_eps: float, score_factor: float = 1.0) -> None:
        super().__init__()
        self.args, self.score_factor, self.latents, self.for_heads = args, score_factor, None, _unchanged
        rank = args.q_rank
        self.wq_a = None if rank is None else nn.Linear(dim, rank, bias=False)
        self.q_a_norm = None if rank is None else nn.RMSNorm(rank, eps=norm_eps)
        self.wq = nn.Linear(dim if rank is None else rank, heads * args.head_dim, bias=False)
        self.wkv_a = nn.Linear(dim, args.kv_features, bias=False)
        self.kv_a_norm = nn.RMSNorm(args.kv_rank, eps=norm_eps)
        self.wkv = nn.Linear(args.kv_rank, heads * (args.nope_dim + args.value_dim), bias=False)
        self.wo = nn.Linear(heads * args.value_dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor, documents: Any = None) -> Tensor:
        """Map ``x`` [batch, seq_len, dim] to [batch, seq_len, dim].

        Args:
            rope: [2, seq_len, rope_dim], or [2, batch, seq_len, rope_dim] if positions differ between sequences.
            documents: for the core; None: each sequence is one document.
        """
        args, (batch, seq_len, _) = self.args, x.shape
        narrow = x if self.wq_a is None or self.q_a_norm is None else self.q_a_norm(self.wq_a(x))
        q = self.wq(narrow).view(batch, seq_len, -1, args.head_dim)
        q_nope, q_rope = q.split((args.nope_dim, args.rope_dim), -1)
        q_rope = apply_rope(q_rope, rope, interleaved=True)
        latent, k_rope = self.wkv_a(x).split((args.kv_rank, args.rope_dim), -1)
        k_rope = apply_rope(self.for_heads(k_rope).unsqueeze(2), rope, interleaved=True).squeeze(2)
        latents = torch.cat((self.kv_a_norm(latent), k_rope), -1)
        if self.latents is not None:
            latents = self.latents(latents.unsqueeze(1)).squeeze(1)
        # A layer whose weight is in a number format, or is sharded, is called, so that it computes in its way.
        plain = type(self.wkv) is nn.Linear and type(self.wkv.weight) is nn.Parameter
        absorbs = latents.shape[1] > seq_len and plain
        attend = self._attend_to_latents if absorbs else self._attend
        parts = {} if documents is None else {"documents": documents}
        out = attend(q_nope, q_rope, latents, parts)
        return self.wo(out.reshape(batch, seq_len, -1))  # type: ignore[no-any-return]

    def _attend(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, parts: dict[str, Any]) -> Tensor:
        """Return the heads' results [batch, seq_len, heads, value_dim]."""
        args, (batch, keys, _) = self.args, latents.shape
        latent, k_rope = latents.split((args.kv_rank, args.rope_dim), -1)
        kv = self.wkv(latent).view(batch, keys, -1, args.nope_dim + args.value_dim)
        k_nope, v = kv.split((args.nope_dim, args.value_dim), -1)
        k = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, k_nope.shape[2], -1)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        if self.score_factor != 1:
            q = q * self.score_factor
        return self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **parts).transpose(1, 2)

    def _attend_to_latents(self, q_nope: Tensor, q_rope: Tensor, latents: Tensor, parts: dict[str, Any]) -> Tensor:
        """Return the same for few queries and many latents. The projection to keys is applied to the queries instead,
        and that to values to the results: all heads then attend to the latents, as one head of keys and values."""
        args = self.args
        weight = self.wkv.weight.unflatten(0, (-1, args.nope_dim + args.value_dim))
        of_keys, of_values = weight.split((args.nope_dim, args.value_dim), 1)
        q = torch.cat((torch.einsum("bshn,hnr->bshr", q_nope, of_keys), q_rope), -1)
        q = q * (self.score_factor * math.sqrt(q.shape[-1] / args.head_dim))  # the core takes q's size for the scale
        keys = latents.unsqueeze(1)
        out = self.core(q.transpose(1, 2), keys, keys[..., : args.kv_rank], **parts)
        return torch.einsum("bhsr,hvr->bshv", out, of_values)

    def init_weights(self, init: Init, out_std: float) -> None:
        for linear in (self.wq_a, self.wq, self.wkv_a, self.wkv):
            if linear is not None:
                init.trunc_normal(linear.weight, std=0.02)
        for norm in (self.q_a_norm, self.kv_a_norm):
            if norm is not None:
                init.ones(norm.weight)
        init.trunc_normal(self.wo.weight, std=out_std)
