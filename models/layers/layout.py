"""A declaration of a model's parts, by name, for the code that spreads the model over devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Projections:
    """The linear layers of a part of a block, by the way in which tensor parallelism shards them.

    Attributes:
        columns: the layers that take the part's first argument, or a latent; their output features can be sharded.
        rows: the layers that take results of the columns; their input features can be sharded.
        arguments: the number of positional arguments of the part's forward; the first is the hidden states.
        head_norms: the norms of heads, [batch, seq_len, heads, head_dim], where a model has them. Heads can be sharded;
            the weights are whole on every device, and their gradients are summed.
        latents: for each column that takes a latent, the layer that makes it from the part's first argument; where a
            model has no such layer, the column takes the argument itself. All heads share the few features of a latent:
            they are computed in parts, and gathered.
        latent_norms: the norms of latents.
        shared_by_heads: the slot of the part for a function that features pass which heads take without a column
            between; "": there are none. The function sums their gradients over the heads.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    arguments: int = 1
    head_norms: tuple[str, ...] = ()
    latents: Mapping[str, str] = field(default_factory=dict)
    latent_norms: tuple[str, ...] = ()
    shared_by_heads: str = ""


@dataclass(frozen=True)
class Layout:
    """The parts of a decoder, by the names of its children: an embedding, a sequence of blocks, a norm and an output. A
    pipeline may cut it before any block, and before the output.

    Attributes:
        parts: the parts of a block that tensor parallelism shards, by name.
        norms: the norms in a block that take hidden states.
        embedding, norm, output: the first and last children; in a pipeline stage they may be None.
        blocks: the ``ModuleDict`` of blocks; its keys are the blocks' numbers in the whole model.
        divisible: the names in the model's arguments of the sizes that tensor parallelism must divide, where a model
            has them; with a dot, of parts of the arguments.
    """

    parts: Mapping[str, Projections]
    norms: tuple[str, ...]
    embedding: str = "tok_embeddings"
    blocks: str = "layers"
    norm: str = "norm"
    output: str = "output"
    divisible: tuple[str, ...] = ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
