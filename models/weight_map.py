"""The places of a model's parameters in the files of other projects.

A weight map gives for each parameter, by its name in titanlite, the place in the files: the name of a tensor,
:class:`Rows` of a tensor that holds several parameters, or a :class:`Stack` of tensors. Tied parameters have several
names and one place. Buffers that training changes, such as the bias of a router, have a place too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor, nn


class Rows(NamedTuple):
    """The rows ``start`` to ``stop`` (exclusive) of a tensor that concatenates several parameters."""

    tensor: str
    start: int
    stop: int


class Stack(NamedTuple):
    """Tensors that form one parameter when stacked along a new first dimension."""

    tensors: tuple[str, ...]


Place: TypeAlias = str | Rows | Stack
WeightMap: TypeAlias = Mapping[str, Place]


def buffers_of(model: nn.Module, weights: WeightMap) -> dict[str, Tensor]:
    """Return the buffers of a model, or of a part of it, that have a place in the files."""
    return {name: buffer for name, buffer in model.named_buffers() if name in weights}


def tensors_of(place: Place) -> tuple[str, ...]:
    """Return the names of the tensors in the files that hold a parameter."""
    if isinstance(place, str):
        return (place,)
    return place.tensors if isinstance(place, Stack) else (place.tensor,)
