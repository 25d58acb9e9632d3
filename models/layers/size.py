"""The size of a model, as far as FLOPs and memory follow from it."""

from __future__ import annotations

from typing import NamedTuple


class ModelSize(NamedTuple):
    """The numbers that determine the FLOPs and the sizes of the tensors between pipeline stages. ``embedding_params``
    are the parameters that are only looked up, never multiplied; ``dim`` is the width of the hidden states."""

    params: int
    embedding_params: int
    layers: int
    heads: int
    head_dim: int
    dim: int
    vocab_size: int
