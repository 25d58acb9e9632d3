"""A declaration of a model's parts, by name, for the code that spreads the model over devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Projections:
    """The linear layers of a part of a block, by the way in which tensor parallelism shards them.

    Attributes:
        columns: the layers that take the part's first argument, or results of the ``narrow`` ones; their output
            features can be sharded.
        rows: the layers that take results of the columns; their input features can be sharded.
        arguments: the number of positional arguments of the part's forward; the first is the hidden states.
        head_norms: the norms of heads, [batch, seq_len, heads, head_dim], where a model has them. Heads can be sharded;
            the weights are whole on every device, and their gradients are summed.
        narrow: the layers that take the part's first argument, where a model has them, and whose few output features
            all heads share. They can be sharded too, and are gathered.
        narrow_norms: the norms of these features.
    """

    columns: tuple[str, ...]
    rows: tuple[str, ...]
    arguments: int = 1
    head_norms: tuple[str, ...] = ()
    narrow: tuple[str, ...] = ()
    narrow_norms: tuple[str, ...] = ()


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
