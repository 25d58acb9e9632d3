"""The sizes of a model that determine its FLOPs and memory."""

from __future__ import annotations

from typing import NamedTuple


class ModelSize(NamedTuple):
    """The sizes that determine a model's FLOPs, and the tensors between pipeline stages. ``embedding_params`` counts
    the parameters that are looked up, not multiplied; ``head_dim`` is the mean of the features of a head of keys and
    one of values; ``dim`` is the width of the hidden states; ``unused_params`` counts the parameters of experts that a
    token does not choose."""

    params: int
    embedding_params: int
    layers: int
    heads: int
    head_dim: int
    dim: int
    vocab_size: int
    unused_params: int = 0
