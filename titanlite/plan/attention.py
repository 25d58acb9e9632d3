"""The sizes of a block's attention on one device, grouped or latent, that time and memory are computed from."""

from __future__ import annotations

from typing import NamedTuple

from titanlite.models.layers import DecoderArgs
from titanlite.plan.linear import Linear


class Attention(NamedTuple):
    """The attention of a block on one device. Sizes are features of a token, of all heads that the device has.

    Attributes:
        linears: its projections, in the order of the forward.
        qk_features: of queries; keys are repeated to as many.
        v_features: of values, repeated likewise, and of the results.
        rotated: those that are read and written beside the projections: rotated, or put together.
        kept: those that are kept for backward, without the hidden states.
        latents: those of the latents, which tensor parallelism gathers.
    """

    linears: tuple[Linear, ...]
    qk_features: float
    v_features: float
    rotated: float
    kept: float
    latents: float = 0.0

    @property
    def elements(self) -> int:
        """The elements of its projections."""
        return sum(linear.k * linear.n for linear in self.linears)

    @property
    def kept_per_op(self) -> float:
        """The features that are kept with checkpointing by operation: every second projection's result, from the first
        on (titanlite/distributed/activation_checkpoint.py), and attention's."""
        return sum(linear.n for linear in self.linears[::2]) + self.v_features


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
        return Attention(grouped, q, q, rotated=q + kv, kept=2 * q + 2 * kv)
    latent, values = args.latent, args.n_heads * args.latent.value_dim // t
    of_keys_and_values = args.n_heads * (latent.nope_dim + latent.value_dim) // t
    of_latents, of_queries = latent.kv_features, latent.q_rank or 0
    queries: tuple[Linear, ...] = (Linear(args.dim, q, split),)
    if of_queries:
        queries = Linear(args.dim, of_queries // t, split), Linear(of_queries, q)
    linears = (
        *queries,
        Linear(args.dim, of_latents // t, split, shares_input=True),  # computed in parts, and gathered
        Linear(latent.kv_rank, of_keys_and_values),
        Linear(values, args.dim, gathered_grad=split),
    )
    # Latents before and after their norms; queries and keys, put together; what values are a part of; the results.
    kept = 2 * (of_latents + of_queries) + 2 * q + of_keys_and_values + values
    return Attention(linears, q, values, rotated=2 * q, kept=kept, latents=of_latents + of_queries)
