"""The decoder that all families share: a plain ``nn.Module`` that knows nothing of parallelism, precision or
devices."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.models.layers.attention import Attention, document_mask
from titanlite.models.layers.feed_forward import FeedForward
from titanlite.models.layers.init import Init
from titanlite.models.layers.latent_attention import LatentArgs, LatentAttention
from titanlite.models.layers.layout import Layout, Projections
from titanlite.models.layers.mixture import Mixture, MixtureArgs
from titanlite.models.layers.rotary import RopeScaling, YarnScaling, rope_table
from titanlite.models.layers.size import ModelSize

_LATENT_NORM_EPS = 1e-6  # DeepSeek's, whatever norm_eps


@dataclass(frozen=True)
class DecoderArgs:
    """The sizes of a model, and what its attention has.

    Attributes:
        vocab_size: 0: taken from the tokenizer.
        head_dim: None: dim / n_heads.
        qkv_bias: queries, keys and values have a bias.
        qk_norm: each head of queries and keys is normalized (RMSNorm) before its rotation.
        sliding_window: the number of positions that each position attends to; None: all before it.
        partial_rotary_factor: the share of a head's features that are rotated; None: all.
        mixture: the experts in place of a feed-forward; None: no block has any.
        latent: the sizes of latent attention, which has as many heads of keys as of queries; None: it is grouped.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    vocab_size: int = 128256
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | YarnScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    max_seq_len: int = 8192
    head_dim: int | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    partial_rotary_factor: float | None = None
    mixture: MixtureArgs | None = None
    latent: LatentArgs | None = None

    @property
    def head_size(self) -> int:
        """The features of one head of queries and keys."""
        if self.latent is not None:
            return self.latent.head_dim
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def active_ffn_dim(self) -> int:
        """The features inside the feed-forward of a block that a token uses: the mean over the blocks, rounded down."""
        if self.mixture is None:
            return self.ffn_dim
        dense = min(self.mixture.n_dense_layers, self.n_layers)
        return (dense * self.ffn_dim + (self.n_layers - dense) * self.mixture.active_dim) // self.n_layers

    @property
    def value_size(self) -> int:
        """The features of one head of values."""
        return self.head_size if self.latent is None else self.latent.value_dim

    @property
    def attention_features(self) -> int:
        """The features of a token's queries, keys, values and results of attention, of all heads."""
        return (self.n_heads + self.n_kv_heads) * (self.head_size + self.value_size)

    @property
    def rotary_size(self) -> int:
        """The features of one head that are rotated."""
        if self.latent is not None:
            return self.latent.rope_dim
        return int(self.head_size * (self.partial_rotary_factor or 1.0))

    def broken_rule(self) -> tuple[tuple[str, ...], str] | None:
        """Return the names of sizes that do not fit together, and the rule; None if all do."""
        if self.latent is not None:
            if self.head_dim is not None:
                return ("head_dim",), "latent attention has no such size"
            if self.n_kv_heads != self.n_heads:
                return ("n_kv_heads", "n_heads"), "latent attention has as many heads of keys as of queries"
        elif self.head_dim is None and self.dim % self.n_heads:
            return ("dim", "n_heads", "head_dim"), f"dim must be a multiple of n_heads = {self.n_heads}"
        if self.n_heads % self.n_kv_heads:
            return ("n_kv_heads", "n_heads"), f"n_kv_heads = {self.n_kv_heads} must divide n_heads = {self.n_heads}"
        if self.rotary_size % 2 or not self.rotary_size:
            names = ("partial_rotary_factor", "head_dim", "dim", "n_heads")
            return names, f"{self.rotary_size} features of a head would be rotated: must be even, and above 0"
        if self.sliding_window is not None and self.sliding_window < 1:
            return ("sliding_window",), f"a window has at least 1 position, and this one {self.sliding_window}"
        lowest = 1 if isinstance(self.rope_scaling, YarnScaling) else 0
        if self.rope_theta <= lowest:
            return ("rope_theta",), f"rope_theta = {self.rope_theta} must be above {lowest}"
        if self.rope_scaling is not None and any(
            number <= 0 for number in vars(self.rope_scaling).values() if number is not None
        ):
            return ("rope_scaling",), f"the numbers of {self.rope_scaling} must be above 0"
        return None if self.mixture is None else self.mixture.broken_rule()

    def configured(self, vocab_size: int, seq_len: int) -> DecoderArgs:
        """Return these arguments for a tokenizer and a sequence length.

        If ``self.vocab_size`` is 0, it becomes the tokenizer's, rounded up to a multiple of 128, as tensor cores and
        sharding prefer; otherwise it must be at least the tokenizer's.

        Raises:
            ValueError: the tokenizer has more tokens than the model.
        """
        if self.vocab_size and vocab_size > self.vocab_size:
            raise ValueError(
                f"the tokenizer has {vocab_size} tokens, more than the {self.vocab_size} of this flavor's vocabulary"
            )
        return replace(self, vocab_size=self.vocab_size or -(-vocab_size // 128) * 128, max_seq_len=seq_len)


def _attention(args: DecoderArgs) -> Attention | LatentAttention:
    if args.latent is not None:
        factor = 1.0 if args.rope_scaling is None else args.rope_scaling.score_factor()
        return LatentAttention(args.dim, args.n_heads, args.latent, norm_eps=_LATENT_NORM_EPS, score_factor=factor)
    return Attention(
        args.dim,
        args.n_heads,
        args.n_kv_heads,
        args.head_size,
        bias=args.qkv_bias,
        norm_eps=args.norm_eps if args.qk_norm else None,
        window=args.sliding_window,
    )


class Block(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream.

    Args:
        number: of the block in the model, from 0.

    Attributes:
        run: a slot for a compiled or checkpointed version of :meth:`compute`; None: call :meth:`compute`.
    """

    run: Callable[..., Any] | None

    def __init__(self, args: DecoderArgs, number: int = 0) -> None:
        super().__init__()
        self.run = None
        self.attention = _attention(args)
        mixture = args.mixture if args.mixture is not None and number >= args.mixture.n_dense_layers else None
        self.feed_forward = Mixture(args.dim, mixture) if mixture else FeedForward(args.dim, args.ffn_dim)
        self.attention_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.ffn_norm = nn.RMSNorm(args.dim, eps=args.norm_eps)

    def forward(self, x: Tensor, rope: Tensor, documents: Any = None) -> Tensor:
        out = (self.run or self.compute)(x, rope, documents)
        return self.feed_forward.record(*out) if isinstance(self.feed_forward, Mixture) else out

    def compute(self, x: Tensor, rope: Tensor, documents: Any = None) -> Any:
        """Return the hidden states; of a mixture, all that :meth:`Mixture.record` takes."""
        x = x + self.attention(self.attention_norm(x), rope, documents)
        if isinstance(self.feed_forward, Mixture):
            out, *learned = self.feed_forward(self.ffn_norm(x))
            return x + out, *learned
        return x + self.feed_forward(self.ffn_norm(x))

    def unused_params(self) -> int:
        """Return the number of parameters that a token does not use."""
        return self.feed_forward.unused_params() if isinstance(self.feed_forward, Mixture) else 0

    def init_weights(self, init: Init, depth: int) -> None:
        # The residual stream sums 2 * depth branches. Smaller output projections keep its scale level.
        out_std = 0.02 / math.sqrt(2 * depth)
        init.ones(self.attention_norm.weight)
        init.ones(self.ffn_norm.weight)
        self.attention.init_weights(init, out_std)
        self.feed_forward.init_weights(init, out_std)


LAYOUT = Layout(
    parts={
        "attention": Projections(("wq", "wk", "wv"), ("wo",), arguments=3, head_norms=("q_norm", "k_norm")),
        "feed_forward": Projections(("w1", "w3"), ("w2",)),
    },
    norms=("attention_norm", "ffn_norm"),
)
LATENT_LAYOUT = replace(
    LAYOUT,
    parts={
        **LAYOUT.parts,
        "attention": Projections(
            *(("wq", "wkv"), ("wo",)),
            arguments=3,
            latents={"wq": "wq_a", "wkv": "wkv_a"},
            latent_norms=("q_a_norm", "kv_a_norm"),
            shared_by_heads="for_heads",
        ),
    },
    divisible=(*LAYOUT.divisible, "latent.q_rank", "latent.kv_features"),
)


class Decoder(nn.Module):
    """A decoder that maps token ids to logits over the vocabulary.

    The initialization is torchtitan's: truncated normal distributions of standard deviation 0.02 for linear layers,
    0.02 / sqrt(2 * depth) for those that write to the residual stream (and w3), and dim**-0.5 for the output
    projection; a normal one of 1 for embeddings. A tied embedding has 0.02, as the tied models of Llama 3.2 and Qwen.

    Attributes:
        positions: a slot for the positions of this process's tokens, int64 [seq_len], if it has a part of each sequence
            or of the model. None: 0, 1, 2, ...
        mask_of: a slot for a function ``(starts, window) -> documents`` that prepares, once for all blocks, what
            attention needs to know of the documents in a sequence.
    """

    # A pipeline stage may lack the ends (None) and layers. Its input is then the hidden states of the stage before.
    tok_embeddings: nn.Embedding | None
    norm: nn.RMSNorm | None
    output: nn.Linear | None
    rope: Tensor
    positions: Tensor | None
    mask_of: Callable[[Tensor, int | None], Any]

    def __init__(self, args: DecoderArgs) -> None:
        super().__init__()
        self.args, self.positions, self.mask_of = args, None, document_mask
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleDict({str(i): Block(args, i) for i in range(args.n_layers)})
        self.norm = nn.RMSNorm(args.dim, eps=args.norm_eps)
        self.output = nn.Linear(args.dim, args.vocab_size, bias=False)
        if args.tie_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rope", torch.empty(2, args.max_seq_len, args.rotary_size), persistent=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        starts: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Map token ids to logits; with labels, to what the output projection makes of them.

        Args:
            x: int64 [batch, seq_len].
            positions: the positions of the tokens in their sequence, int64 [seq_len]; None: ``self.positions``.
            starts: for each token, the index in the sequence at which its document begins, int64 [batch, seq_len]. A
                token then has its position in its document, and attends to that alone. None: each sequence is one
                document.
            labels: int64 [batch, seq_len], for an output projection that takes them.

        Returns:
            [batch, seq_len, vocab_size], in the dtype of the parameters.
        """
        positions, documents = self.positions if positions is None else positions, None
        if starts is not None:
            positions = torch.arange(starts.shape[1], device=starts.device) - starts
            documents = self.mask_of(starts, self.args.sliding_window)
        rope = self.rope[:, : x.shape[1]] if positions is None else self.rope[:, positions]
        if self.tok_embeddings is not None:
            x = self.tok_embeddings(x)
        for layer in self.layers.values():
            x = layer(x, rope, documents)
        if self.norm is None or self.output is None:
            return x
        return self.output(self.norm(x)) if labels is None else self.output(self.norm(x), labels=labels)

    @torch.no_grad()
    def init_weights(self, init: Init) -> None:
        """Fill every parameter and buffer. They may be sharded, and uninitialized."""
        args = self.args
        self.rope.copy_(rope_table(self.rope.shape[1], args.rotary_size, args.rope_theta, args.rope_scaling))
        if self.tok_embeddings is not None and not args.tie_embeddings:
            init.normal(self.tok_embeddings.weight, std=1.0)
        for i, layer in self.layers.items():
            assert isinstance(layer, Block)
            layer.init_weights(init, depth=int(i) + 1)
        if self.norm is not None:
            init.ones(self.norm.weight)
        if self.output is not None:
            # Where a token's own embedding still stands out of the last hidden states, a tied head predicts that token
            # again. At a width of 256 the first loss is 13.2 with dim**-0.5, and 8.4 with 0.02 (ln(vocabulary): 8.3).
            init.trunc_normal(self.output.weight, std=0.02 if args.tie_embeddings else args.dim**-0.5)

    def size(self) -> ModelSize:
        """Return the sizes that determine FLOPs and memory. To be called on the whole model."""
        args, embedding = self.args, self.tok_embeddings
        assert embedding is not None
        return ModelSize(
            params=sum(p.numel() for p in self.parameters()),
            unused_params=sum(block.unused_params() for block in self.layers.values()),  # type: ignore[operator]
            # A tied embedding is also the output projection, which is a matmul.
            embedding_params=0 if args.tie_embeddings else embedding.weight.numel(),
            layers=args.n_layers,
            heads=args.n_heads,
            head_dim=(args.head_size + args.value_size) // 2,
            dim=args.dim,
            vocab_size=args.vocab_size,
        )
