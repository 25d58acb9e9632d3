"""Llama 3: a plain ``nn.Module`` that knows nothing of parallelism, precision or devices.

The rotary embedding pairs element i with i + head_dim/2, as Hugging Face's checkpoints do, so that weights move to
and from them without a permutation. (Meta's own files pair 2i with 2i+1; the two differ by a permutation of the rows
of wq and wk.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Init(Protocol):
    """What fills parameters with their initial values (see ``titanlite.distributed.init``)."""

    def trunc_normal(self, param: Tensor, std: float, bound: float = 3.0) -> None: ...
    def normal(self, param: Tensor, std: float) -> None: ...
    def ones(self, param: Tensor) -> None: ...


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretch of the rotary frequencies for long contexts (Llama 3.1 model card, ``rope_scaling``)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class Llama3Args:
    """The shape of a model. ``vocab_size`` 0 is filled in from the tokenizer."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128256
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_seq_len: int = 8192

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads


def rope_frequencies(args: Llama3Args) -> Tensor:
    """The rotation per position of each pair, in radians; float32 [head_dim / 2]."""
    exponent = torch.arange(0, args.head_dim, 2, dtype=torch.float32, device="cpu") / args.head_dim
    freqs = 1.0 / args.rope_theta**exponent
    s = args.rope_scaling
    if s is None:
        return freqs
    wavelength = 2 * math.pi / freqs
    # Between the two wavelengths the scaled and the unscaled frequency are blended linearly.
    smooth = (s.original_max_seq_len / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * freqs / s.factor + smooth * freqs


def rope_table(args: Llama3Args, seq_len: int) -> Tensor:
    """Cosines and sines of every position; float32 [2, seq_len, head_dim]."""
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device="cpu"), rope_frequencies(args))
    angles = torch.cat((angles, angles), dim=-1)
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate ``x`` [batch, seq_len, heads, head_dim] by ``rope`` [2, seq_len, head_dim], computed in float32."""
    cos, sin = rope[:, None, :, None].unbind()
    xf = x.float()
    x1, x2 = xf.chunk(2, dim=-1)
    return (xf * cos + torch.cat((-x2, x1), dim=-1) * sin).to(x.dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of q [batch, heads, seq_len, head_dim] to k and v [batch, kv_heads, seq_len, head_dim]."""
    # Grouped without asking whether it is: the compiler may hold the numbers of heads as symbols.
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


class Attention(nn.Module):
    """Causal grouped-query attention. What ``attend`` does can be replaced on an instance."""

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(causal_attention)

    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.head_dim = args.head_dim
        self.wq = nn.Linear(args.dim, args.n_heads * args.head_dim, bias=False)
        self.wk = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wv = nn.Linear(args.dim, args.n_kv_heads * args.head_dim, bias=False)
        self.wo = nn.Linear(args.n_heads * args.head_dim, args.dim, bias=False)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        batch, seq_len, _ = x.shape
        # -1, not the number of heads: under tensor parallelism each device has its share of them.
        q = apply_rope(self.wq(x).view(batch, seq_len, -1, self.head_dim), rope)
        k = apply_rope(self.wk(x).view(batch, seq_len, -1, self.head_dim), rope)
        v = self.wv(x).view(batch, seq_len, -1, self.head_dim)
        out = self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.wo(out.transpose(1, 2).reshape(batch, seq_len, -1))

    def init_weights(self, init: Init, out_std: float) -> None:
        for linear in (self.wq, self.wk, self.wv):
            init.trunc_normal(linear.weight, std=0.02)
        init.trunc_normal(self.wo.weight, std=out_std)


def swiglu(w2: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    return w2(F.silu(gate) * up)  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """SwiGLU: ``w2(silu(w1 x) * w3 x)``. What ``swiglu`` does can be replaced on an instance."""

    swiglu: Callable[[nn.Module, Tensor, Tensor], Tensor] = staticmethod(swiglu)

    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.w1 = nn.Linear(args.dim, args.ffn_dim, bias=False)
        self.w2 = nn.Linear(args.ffn_dim, args.dim, bias=False)
        self.w3 = nn.Linear(args.dim, args.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.swiglu(self.w2, self.w1(x), self.w3(x))

    def init_weights(self, init: Init, out_std: float) -> None:
        init.trunc_normal(self.w1.weight, std=0.02)
        init.trunc_normal(self.w2.weight, std=out_std)
        init.trunc_normal(self.w3.weight, std=out_std)


class TransformerBlock(nn.Module):
    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        return x + self.feed_forward(self.ffn_norm(x))

    def init_weights(self, init: Init, depth: int) -> None:
        # The residual stream adds up 2 * depth branches; their output projections shrink so that it stays level.
        out_std = 0.02 / math.sqrt(2 * depth)
        init.ones(self.attention_norm.weight)
        init.ones(self.ffn_norm.weight)
        self.attention.init_weights(init, out_std)
        self.feed_forward.init_weights(init, out_std)


class Llama3(nn.Module):
    """Token ids in, logits over the vocabulary out.

    The initialization is torchtitan's: linear layers truncated normal of standard deviation 0.02, the ones that write
    to the residual stream (and w3) 0.02 / sqrt(2 * depth), embeddings 1, the output projection dim**-0.5. A tied
    embedding is also the output projection, so it takes the latter.
    """

    # In a part of the model the ends may be None and layers be missing; it takes the hidden states of the part before.
    tok_embeddings: nn.Embedding | None
    norm: nn.RMSNorm | None
    output: nn.Linear | None
    rope: Tensor

    def __init__(self, args: Llama3Args) -> None:
        super().__init__()
        self.args = args
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): TransformerBlock(args) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", torch.empty(2, args.max_seq_len, args.head_dim), persistent=False)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token ids to logits.

        Args:
            x: int64 [batch, seq_len].
            positions: of the tokens in their sequence; int64 [seq_len], by default 0, 1, 2, ...

        Returns:
            [batch, seq_len, vocab_size], in the dtype of the parameters.
        """
        rope = self.rope[:, : x.shape[1]] if positions is None else self.rope[:, positions]
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x, rope)
        return x if self.norm is None or self.output is None else self.output(self.norm(x))

    @torch.no_grad()
    def init_weights(self, init: Init) -> None:
        """Fill every parameter and buffer; they may be sharded, and hold anything before."""
        self.rope.copy_(rope_table(self.args, self.rope.shape[1]))
        if self.tok_embeddings is not None and not self.args.tie_embeddings:
            init.normal(self.tok_embeddings.weight, std=1.0)
        for i, layer in self.layers.items():
            assert isinstance(layer, TransformerBlock)
            layer.init_weights(init, depth=int(i) + 1)
        if self.norm is not None:
            init.ones(self.norm.weight)
        if self.output is not None:
            init.trunc_normal(self.output.weight, std=self.args.dim**-0.5)
