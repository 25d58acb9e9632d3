"""The places of a model's parameters in the files of others.

A weight map says for each parameter, by its name here, where it is there: the name of a tensor, :class:`Rows` of a
tensor that holds several parameters, or a :class:`Stack` of tensors. Tied parameters have several names here and one
place there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias


class Rows(NamedTuple):
    """The rows ``start`` to ``stop`` of a tensor that holds several parameters one below the other."""

    tensor: str
    start: int
    stop: int


class Stack(NamedTuple):
    """Tensors that are one parameter together, stacked along a new first dimension."""

    tensors: tuple[str, ...]


Place: TypeAlias = str | Rows | Stack
WeightMap: TypeAlias = Mapping[str, Place]


def tensors_of(place: Place) -> tuple[str, ...]:
    """Return the names of the tensors in the files that hold a parameter."""
    if isinstance(place, str):
        return (place,)
    return place.tensors if isinstance(place, Stack) else (place.tensor,)
