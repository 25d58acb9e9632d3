"""Moments of Adam that a checkpoint has in another precision than the run: converted as they are loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import torch
from torch import Tensor

from titanlite.checkpoint.metadata import SavedTensor
from titanlite.checkpoint.state import State, local_part
from titanlite.optim.moments import from_blocks, has_blocks, to_blocks, zeros_of_blocks

_MOMENTS = ("exp_avg", "exp_avg_sq")
_HALF = 1 << 15  # of the 2^16 values of the noise: it rounds to nearest


def converted(local: State, saved: Mapping[str, SavedTensor]) -> tuple[State, list[Callable[[], None]]]:
    """Return the optimizer state to load, and what to do after that.

    Moments of 8 bits have scales of blocks beside them. Where the saved ones have, and those of the run have not, or
    the reverse, float32 tensors are loaded in their place.

    Args:
        local: that of :func:`titanlite.checkpoint.state.optimizer_state`.
        saved: the tensors of the checkpoint.
    """
    state, after = dict(local), []
    for name, moment in local.items():
        scale = f"{name}_scale"
        if name.rpartition(".")[2] not in _MOMENTS or (scale in local) == (scale in saved):
            continue
        if scale in saved and not has_blocks(moment):
            continue  # shards that are no whole blocks; the check of names refuses them
        squared = name.endswith("_sq")
        state[name] = values = zeros_of_blocks(moment, torch.float32, 1)
        if scale in saved:
            state[scale] = scales = zeros_of_blocks(moment, torch.float32)
            after.append(_from_blocks(moment, values, scales, squared))
        else:
            del state[scale]
            after.append(_to_blocks(moment, local[scale], values, squared))
    return state, after


def _from_blocks(moment: Tensor, data: Tensor, scale: Tensor, squared: bool) -> Callable[[], None]:
    def convert() -> None:
        values = from_blocks(local_part(data), local_part(scale))
        local_part(moment).copy_(values.square() if squared else values)

    return convert


def _to_blocks(moment: Tensor, scale: Tensor, values: Tensor, squared: bool) -> Callable[[], None]:
    def convert() -> None:
        exact = local_part(values).sqrt() if squared else local_part(values)
        data, scales = to_blocks(exact, torch.full_like(exact, _HALF, dtype=torch.int32), keep_positive=squared)
        local_part(moment).view(torch.uint8).copy_(data.view(torch.uint8))
        local_part(scale).copy_(scales)

    return convert


def difference(local: State, saved: Mapping[str, SavedTensor]) -> str | None:
    """Return the precision of the saved moments and of those of the run, in words, where they differ; by the largest
    that this process has. (A checkpoint does not say its dtypes; the bytes of a large tensor do.)"""
    names = [name for name in local if name.rpartition(".")[2] == "exp_avg" and name in saved]
    if not names:
        return None
    largest = max(names, key=lambda name: prod(saved[name].shape))
    per_element = saved[largest].chunks.num_bytes / max(1, prod(saved[largest].shape))
    before = max((size for size in (1, 2, 4) if size <= per_element), default=1)
    now = local[largest].element_size()
    return None if before == now else f"{8 * before} bits to {8 * now}"
