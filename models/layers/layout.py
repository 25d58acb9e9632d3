"""A declaration of a model's parts, by name, for the code that spreads the model over devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Projections:
    """A part of a block whose linear layers come in two kinds, as tensor parallelism sees them.

    Attributes:
        columns: the linear layers that take the part's first argument; their output features can be sharded.
        rows: those that take what is made of these; their input features can be sharded.
        arguments: how many positional arguments the part's forward takes; the first is the hidden states.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    arguments: int = 1


@dataclass(frozen=True)
class Layout:
    """A decoder's parts, by the names of its children: an embedding, blocks one after the other, a norm and an output.
    A pipeline may cut it before any block.

    Attributes:
        parts: by name in a block, what tensor parallelism shards.
        norms: the norms in a block that take hidden states.
        embedding, norm, output: the ends of the model; in a part of the model they may be None.
        blocks: the ``ModuleDict`` of blocks, whose keys are their numbers in the whole model.
        divisible: the sizes, by their names in the model's arguments, that tensor parallelism divides.
    """

    parts: Mapping[str, Projections]
    norms: tuple[str, ...]
    embedding: str = "tok_embeddings"
    blocks: str = "layers"
    norm: str = "norm"
    output: str = "output"
    divisible: tuple[str, ...] = ("n_heads", "n_kv_heads", "ffn_dim", "vocab_size")
