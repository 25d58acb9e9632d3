"""The check of a save's plan: against DCP's own, on parts of tensors that fit, overlap, leave gaps or lie outside."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch.distributed.checkpoint.default_planner import _validate_global_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from titanlite.checkpoint.planner import FlatPlanner, problems_of_plan

Box = tuple[list[int], list[int]]  # offset, sizes
TWO_RANKS = [SavePlan([]), SavePlan([])]


def metadata_of(shape: list[int], boxes: list[Box]) -> Metadata:
    chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in boxes]
    return Metadata({"w": TensorStorageMetadata(TensorProperties(torch.float32), torch.Size(shape), chunks)})


def cut(offset: list[int], sizes: list[int], parts: int, draw: random.Random) -> list[Box]:
    """Cut a box at random places until there are about ``parts``."""
    dim = draw.randrange(len(sizes))
    if parts <= 1 or sizes[dim] < 2:
        return [(offset, sizes)]
    at = draw.randrange(1, sizes[dim])
    low, high = [*sizes], [*sizes]
    low[dim], high[dim] = at, sizes[dim] - at
    behind = [*offset]
    behind[dim] += at
    return cut(offset, low, parts // 2, draw) + cut(behind, high, parts - parts // 2, draw)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_verdict_is_that_of_dcp(dims: int) -> None:
    draw, verdicts = random.Random(dims), []
    for _ in range(200):
        shape = [draw.randrange(1, 12) for _ in range(dims)]
        boxes = cut([0] * dims, shape, draw.randrange(1, 9), draw)
        for _ in range(draw.randrange(3)):
            offset, sizes = ([*part] for part in draw.choice(boxes))
            draw.choice((offset, sizes))[draw.randrange(dims)] += draw.choice((-1, 1))
            if all(sizes):
                boxes[draw.randrange(len(boxes))] = offset, sizes
        boxes += [([*shape], [0] * dims)] * draw.randrange(2)  # of a rank without a shard
        draw.shuffle(boxes)
        metadata = metadata_of(shape, boxes)
        verdicts.append(bool(problems_of_plan(metadata)))
        assert verdicts[-1] == bool(_validate_global_plan(TWO_RANKS, metadata)), (shape, boxes)
    assert 20 < sum(verdicts) < 180


def test_parts_that_no_cut_parts_are_compared() -> None:
    """A pinwheel: four boxes around one, of which no line through all separates any."""
    pinwheel: list[Box] = [([0, 0], [1, 2]), ([0, 2], [2, 1]), ([2, 1], [1, 2]), ([1, 0], [2, 1]), ([1, 1], [1, 1])]
    assert problems_of_plan(metadata_of([3, 3], pinwheel)) == []
    shifted = [*pinwheel[:-1], ([0, 1], [1, 1])]  # as many elements, one of them twice
    assert problems_of_plan(metadata_of([3, 3], shifted)) == ["w: two chunks overlap"]


def plans_of(shape: list[int], ranks: int, tensors: int = 1) -> list[SavePlan]:
    rows, properties = shape[0] // ranks, TensorProperties(torch.float32)
    plans = []
    for rank in range(ranks):
        offset = torch.Size([rank * rows, 0])
        chunk = ChunkStorageMetadata(offset, torch.Size([rows, shape[1]]))
        data = TensorWriteData(chunk, properties, torch.Size(shape))
        items = [
            WriteItem(MetadataIndex(f"w{i}", offset), WriteItemType.SHARD, tensor_data=data) for i in range(tensors)
        ]
        plans.append(SavePlan(items))
    return plans


def test_the_planner_refuses_a_wrong_plan_by_name() -> None:
    good, broken = plans_of([8, 4], 4), plans_of([8, 4], 4)[:3]
    plans, metadata = FlatPlanner().create_global_plan(good)
    assert len(plans) == 4
    assert problems_of_plan(metadata) == []
    with pytest.raises(ValueError, match="w0: its chunks have 24 elements, and it has 32"):
        FlatPlanner().create_global_plan(broken)


def test_many_shards_of_rows_of_a_wide_tensor_take_no_time() -> None:
    """DCP's check compares all pairs of these: 40 s."""
    boxes: list[Box] = [([i, 0], [1, 1 << 15]) for i in range(1 << 14)]
    begin = time.perf_counter()
    assert problems_of_plan(metadata_of([1 << 14, 1 << 15], boxes)) == []
    assert time.perf_counter() - begin < 4
