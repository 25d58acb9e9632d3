"""The agreement of ranks on the scales of operands that they share, each of them having a part."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from titanlite.quant.format import Format, OperandName, Use

_c10d = torch.ops._c10d_functional


class Shards(NamedTuple):
    """The operands of a layer of which each rank has a part.

    Attributes:
        group: the name of the group of ranks.
        dims: the dimension of the 2-D operand that is split. Every rank has the whole of the other operands.
    """

    group: str
    dims: Mapping[OperandName, int]


class Agreement:
    """The amaxes of several casts over all ranks, by one all-reduce. It is under way until the first of them is read,
    so that other work can come between."""

    def __init__(self, shards: Shards | None, format: Format, casts: Iterable[tuple[Tensor, tuple[Use, ...]]]) -> None:
        """Begin with the casts of ``casts``: a matrix, and its uses. Those that need no agreement are left out."""
        self.amaxes: dict[Use, Tensor] = {}
        self.pending: Tensor | None = None
        if shards is None:
            return
        for x, uses in casts:
            to_agree = tuple(use for use in uses if use.operand in shards.dims)
            to_agree = tuple(use for use in to_agree if format.agrees(use, shards.dims[use.operand]))
            if to_agree:
                self.amaxes |= format.amaxes(x.detach().reshape(-1, x.shape[-1]), to_agree)
        # An amax that serves two uses is sent once.
        self.sent = list({id(amax): amax for amax in self.amaxes.values()}.values())
        if self.sent:
            flat = torch.cat([amax.reshape(-1) for amax in self.sent])
            self.pending = _c10d.all_reduce(flat, "max", shards.group)

    def get(self, use: Use) -> Tensor | None:
        """Return the amaxes for a cast; None if it takes those of this rank's part."""
        if self.pending is not None:
            parts = _c10d.wait_tensor(self.pending).split([amax.numel() for amax in self.sent])
            agreed = {id(amax): part.reshape(amax.shape) for amax, part in zip(self.sent, parts, strict=True)}
            self.amaxes = {use: agreed[id(amax)] for use, amax in self.amaxes.items()}
            self.pending = None
        return self.amaxes.get(use)


NO_AGREEMENT = Agreement(None, None, ())  # type: ignore[arg-type]
"""For casts that no other rank takes part in."""
