"""The planner of saves: DCP's, with a check of the whole plan that does not compare each pair of shards."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_global_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan

_MOST_LISTED = 5
Boxes = np.ndarray[tuple[int, int], np.dtype[np.int64]]


class FlatPlanner(DefaultSavePlanner):
    """DCP's planner for a flat state, with another check that the chunks of each tensor make up the tensor.

    DCP sorts the chunks along the longest dimension, and compares each with all that share a place there (torch 2.13).
    A weight that is longer in its columns and sharded by rows, such as ``w2``, has only chunks that do: the check took
    the square of their number.

    Args:
        series: the name under which DCP keeps plans between saves; empty: it keeps none.
    """

    def __init__(self, series: str = "") -> None:
        super().__init__(flatten_state_dict=False, enable_plan_caching=bool(series))
        self._cached_plans_key = series

    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        if problems := problems_of_plan(metadata):
            more = f", and {len(problems) - _MOST_LISTED} more" if len(problems) > _MOST_LISTED else ""
            raise ValueError(f"the plan of the save is wrong: {'; '.join(problems[:_MOST_LISTED])}{more}")
        return plans, metadata


def problems_of_plan(metadata: Metadata) -> list[str]:
    """Return a line for each tensor whose chunks do not make it up: each element once."""
    tensors = {n: t for n, t in metadata.state_dict_metadata.items() if isinstance(t, TensorStorageMetadata)}
    problems = {name: _problem(tensor.size, tensor.chunks) for name, tensor in tensors.items() if len(tensor.size)}
    return [f"{name}: {problem}" for name, problem in problems.items() if problem]


def _problem(shape: Sequence[int], chunks: Sequence[ChunkStorageMetadata]) -> str | None:
    begins = np.array([chunk.offsets for chunk in chunks], dtype=np.int64)
    sizes = np.array([chunk.sizes for chunk in chunks], dtype=np.int64)
    ends = begins + sizes
    if (begins < 0).any() or (sizes < 0).any() or (ends > np.array(shape)).any():
        return "a chunk lies outside of it"
    count = int(sizes.prod(axis=1).sum())
    if count != math.prod(shape):
        return f"its chunks have {count} elements, and it has {math.prod(shape)}"
    full = sizes.all(axis=1)
    return "two chunks overlap" if _overlap(begins[full], ends[full]) else None


def _overlap(begins: Boxes, ends: Boxes) -> bool:
    """Return whether any two boxes share an element. Where they can be parted along a dimension, as shards can, each
    part is looked at alone; else all are compared with each other.

    Args:
        begins, ends: the first corner of each box, and the one behind its last: [boxes, dimensions].
    """
    if len(begins) < 2:
        return False
    for dim in range(begins.shape[1]):
        order = np.argsort(begins[:, dim], kind="stable")
        reach = np.maximum.accumulate(ends[order, dim])
        cuts = np.flatnonzero(begins[order[1:], dim] >= reach[:-1]) + 1
        if len(cuts):
            bounds = np.concatenate(([0], cuts, [len(order)]))
            parts = (order[bounds[i] : bounds[i + 1]] for i in np.flatnonzero(np.diff(bounds) > 1))
            return any(_overlap(begins[part], ends[part]) for part in parts)
    return any(
        ((begins[i] < ends[i + 1 :]) & (begins[i + 1 :] < ends[i])).all(axis=1).any() for i in range(len(begins))
    )
