"""The granularities of scales for inference, with torchao's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class PerTensor:
    """One scale for the tensor."""


@dataclass(frozen=True)
class PerRow:
    """One scale for each row: each output feature of a weight, each token of an activation.

    Args:
        dim: the dimension that is reduced: the last one.

    Raises:
        ValueError: another dimension.
    """

    dim: int = -1

    def __post_init__(self) -> None:
        if self.dim != -1:
            raise ValueError(f"PerRow(dim={self.dim}): must be -1, the features, which the matmul sums over")

    def __repr__(self) -> str:
        return "PerRow()"


FP8Granularity: TypeAlias = PerTensor | PerRow


def granularity_of(value: Any) -> FP8Granularity | None:
    """Return ``value`` as one of this module's granularities; None if it is none. torchao's objects, which have the
    same names and fields, are accepted too.

    Raises:
        ValueError: a PerRow along another dimension than the last.
    """
    if isinstance(value, FP8Granularity):
        return value
    name = type(value).__name__
    if name == "PerTensor":
        return PerTensor()
    return PerRow(getattr(value, "dim", -1)) if name == "PerRow" else None
