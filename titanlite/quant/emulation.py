"""The matmuls of emulated formats."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32, under autocast too."""
    # (There is no autocast on the meta device.)
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()


@torch.library.custom_op("titanlite::multiply_groups_in_float32", mutates_args=())
def multiply_groups_in_float32(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return one product for each group. The host waits for a GPU here.

    Args:
        a, b: float32. With b [groups, k, m], the rows of a [rows, k] are in groups, and the result is [rows, m]. With b
            [rows, m], the columns of a [k, rows] are, and the result is [groups, k, m].
        offsets: the end of each group, int32 [groups].
    """
    of_rows = b.ndim == 3
    # What is after the last group has no product, and whatever is in it must not look like one.
    out = a.new_zeros((a.shape[0], b.shape[2]) if of_rows else (offsets.shape[0], a.shape[0], b.shape[1]))
    start = 0
    for group, stop in enumerate(offsets.tolist()):
        if of_rows:
            torch.mm(a[start:stop], b[group], out=out[start:stop])
        else:
            torch.mm(a[:, start:stop], b[start:stop], out=out[group])
        start = stop
    return out


@multiply_groups_in_float32.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[2]) if b.ndim == 3 else (offsets.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(shape)
