"""The sizes of a block's attention on one device, grouped or latent, that time and memory are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from titanlite.models.layers import DecoderArgs


@dataclass(frozen=True)
class Linear:
    """A linear layer of a block on one device.

    Attributes:
        k, n: the features in and out that this device has.
        gathered_input, gathered_grad: tensor parallelism gathers the rows of the input, or of the gradient.
        shares_input: an earlier layer of the block takes the same input, and casts it.
        experts: the experts that have such a matrix each, and share the tokens evenly; 0: it is a linear layer, which
            converters to number formats take.
    """

    k: int
    n: int
    gathered_input: bool = False
    gathered_grad: bool = False
    shares_input: bool = False
    experts: int = 0


class Attention(NamedTuple):
    """The attention of a block.

    Attributes:
        linears: its projections, in the order of the forward.
        keys, values: the features of all heads of queries, and of as many heads of values: of the two sides that its
            matmuls multiply.
        rotated: the features of a token that are read and written beside the projections: rotated, or put together.
        kept: the features of a token that are kept for backward, without the hidden states.
        kept_per_op: those with checkpointing by operation, which keeps every second projection's result, and
            attention's.
    """

    linears: tuple[Linear, ...]
    keys: float
    values: float
    rotated: float
    kept: float
    kept_per_op: float

    @property
    def elements(self) -> int:
        """The elements of its projections."""
        return sum(linear.k * linear.n for linear in self.linears)


def attention_of(args: DecoderArgs, tensor_parallel: int = 1) -> Attention:
    """Return the attention of a block, whose heads tensor parallelism shards."""
    t, split = tensor_parallel, tensor_parallel > 1
    q, kv = args.n_heads * args.head_size // t, args.n_kv_heads * args.head_size // t
    if args.latent is None:
        grouped = (
            Linear(args.dim, q, split),
            Linear(args.dim, kv, split, shares_input=True),
            Linear(args.dim, kv, split, shares_input=True),
            Linear(q, args.dim, gathered_grad=split),
        )
        return Attention(grouped, q, q, rotated=q + kv, kept=2 * q + 2 * kv, kept_per_op=2 * q + kv)
    latent, values = args.latent, args.n_heads * args.latent.value_dim // t
    down = latent.kv_rank + latent.rope_dim  # computed in parts, and gathered
    expanded = args.n_heads * (latent.nope_dim + latent.value_dim) // t
    if latent.q_rank is None:
        queries: tuple[Linear, ...] = (Linear(args.dim, q, split),)
    else:
        queries = Linear(args.dim, latent.q_rank // t, split), Linear(latent.q_rank, q)
    linears = (
        *queries,
        Linear(args.dim, down // t, split, shares_input=True),
        Linear(latent.kv_rank, expanded),
        Linear(values, args.dim, gathered_grad=split),
    )
    # Latents before and after their norms; queries, keys and values of all heads, and attention's result.
    latents = 2 * (down + (latent.q_rank or 0))
    kept = latents + 2 * q + 2 * values
    return Attention(linears, q, values, rotated=2 * q, kept=kept, kept_per_op=latents / 2 + q + values)
