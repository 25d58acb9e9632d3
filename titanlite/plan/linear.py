"""The size of a linear layer of a block on one device."""

from __future__ import annotations

from dataclasses import dataclass


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
