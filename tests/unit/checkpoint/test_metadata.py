"""The reader of ``.metadata`` against DCP's own on random layouts, and on files that are made to mislead."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from tests.unit.checkpoint.test_planner import cut
from titanlite.checkpoint.metadata import METADATA, Chunk, Chunks, read_metadata
from titanlite.errors import ConfigError
from titanlite.untrusted import pickles

PROPERTIES = TensorProperties(torch.bfloat16)


def as_gathered(metadata: Metadata) -> None:
    """Make the places objects of their own, as those that each rank sends."""
    entries = [pickle.loads(pickle.dumps(entry)) for entry in metadata.storage_data.items()]
    metadata.storage_data = dict(entries)


def random_checkpoint(folder: Path, draw: random.Random) -> None:
    """Write what DCP writes, and files of the sizes that it states: tensors of 0 to 4 dimensions, cut at random, some
    with chunks without elements; entries that are no tensors; equal shapes that are one object, or several."""
    metadata, free = Metadata({}, storage_data={}, planner_data={"a": ("b", 1)}), {}

    def place() -> _StorageInfo:
        file, length = f"__{draw.randrange(300)}_0.distcp", draw.choice((1 << 16, 70_000, 5_000_000_000))
        free[file] = free.get(file, 0) + length
        return _StorageInfo(file, free[file] - length, length)

    for number in range(draw.randrange(1, 25)):
        name = f"model.layers.{number}.weight"
        shape = [draw.choice((1, 2, 3, 300, 70_000)) for _ in range(draw.randrange(5))]
        while torch.Size(shape).numel() > 1 << 16:
            shape.pop()
        boxes = cut([0] * len(shape), shape, draw.randrange(1, 80), draw) if shape else [([], [])]
        boxes += [([*shape], [0] * len(shape))] * draw.randrange(2) if shape else []
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in boxes]
        metadata.state_dict_metadata[name] = TensorStorageMetadata(PROPERTIES, torch.Size(shape), chunks)
        for index, chunk in enumerate(chunks):
            offset = draw.choice((chunk.offsets, torch.Size([*chunk.offsets])))
            metadata.storage_data[MetadataIndex(name, offset, index)] = place()
    metadata.state_dict_metadata["train_state"] = BytesStorageMetadata()
    metadata.storage_data[MetadataIndex("train_state")] = place()
    if draw.random() < 0.5:
        entries = [*metadata.storage_data.items()]
        draw.shuffle(entries)
        metadata.storage_data = dict(entries)
    if draw.random() < 0.5:
        as_gathered(metadata)
    folder.mkdir()
    (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol=draw.choice((2, 3, 4, 5))))
    for file, size in free.items():
        with (folder / file).open("wb") as stream:
            stream.truncate(size)


@pytest.mark.parametrize("seed", range(30))
def test_it_is_what_dcp_reads(tmp_path: Path, seed: int) -> None:
    random_checkpoint(tmp_path / "step", random.Random(seed))
    metadata, saved = FileSystemReader(tmp_path / "step").read_metadata(), read_metadata(tmp_path / "step")
    entries = {n: e for n, e in metadata.state_dict_metadata.items() if isinstance(e, TensorStorageMetadata)}
    assert saved.keys() == entries.keys()
    for name, entry in entries.items():
        places = [metadata.storage_data[MetadataIndex(name, chunk.offsets)] for chunk in entry.chunks]
        assert saved[name].shape == entry.size
        assert [*saved[name].chunks] == [
            Chunk(tuple(chunk.offsets), tuple(chunk.sizes), place.relative_path, place.offset, place.length)
            for chunk, place in zip(entry.chunks, places)
        ]


def test_rows_are_read_many_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the places were gathered of several ranks. The loop would take several times as long."""
    shape, of_loop = torch.Size((2000, 8)), []
    chunks = [ChunkStorageMetadata(torch.Size((rank, 0)), torch.Size((1, 8))) for rank in range(2000)]
    entry = TensorStorageMetadata(PROPERTIES, shape, chunks)
    metadata = Metadata({f"w{i}": pickle.loads(pickle.dumps(entry)) for i in range(2)})
    metadata.storage_data = {
        MetadataIndex(f"w{i}", chunk.offsets, rank): _StorageInfo("__0_0.distcp", 64 * (2000 * i + rank), 64)
        for i in range(2)
        for rank, chunk in enumerate(chunks)
    }
    as_gathered(metadata)
    place = pickle.loads(pickle.dumps([*metadata.storage_data.values()]))  # of one rank: one object is the file's name
    metadata.storage_data = dict(zip(metadata.storage_data, place))
    (tmp_path / METADATA).write_bytes(pickle.dumps(metadata))
    (tmp_path / "__0_0.distcp").write_bytes(bytes(64 * 4000))
    build = pickles._build
    monkeypatch.setattr(pickles, "_build", lambda *args: of_loop.append(1) or build(*args))
    assert [len(tensor.chunks) for tensor in read_metadata(tmp_path).values()] == [2000, 2000]
    assert len(of_loop) < 400  # of 10,000


@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_chunks_within_a_part(dims: int) -> None:
    draw = random.Random(dims)
    for _ in range(50):
        shape = [draw.randrange(1, 8) for _ in range(dims)]
        boxes = cut([0] * dims, shape, 20, draw) if dims else [([], [])]
        boxes += [([*shape], [0] * dims)] if dims else []
        numbers = [np.array([box[i] for box in boxes], dtype=np.int64).reshape(len(boxes), dims) for i in (0, 1)]
        chunks = Chunks(*numbers, np.zeros((len(boxes), 3), dtype=np.int64), ("file",))
        begin = [draw.randrange(size) for size in shape]
        sizes = [draw.randrange(size - start + 1) for start, size in zip(begin, shape)]
        expected = torch.zeros(shape)
        expected[tuple(slice(b, b + n) for b, n in zip(begin, sizes))] = 1
        reached = torch.zeros(shape)
        for chunk, offset, shared in chunks.within(begin, sizes):
            assert all(c <= o and o + n <= c + m for o, n, c, m in zip(offset, shared, chunk.offset, chunk.shape))
            assert 0 not in shared
            reached[tuple(slice(o, o + n) for o, n in zip(offset, shared))] += 1
        assert torch.equal(reached, expected)


# ---- made to mislead

NAME = "model.w.weight"


class Called:
    """Its pickle calls ``kind`` with ``args``, and gives what comes of it the ``state``."""

    def __init__(self, kind: Any, *args: Any, state: Any = None) -> None:
        self.reduced = (kind, args) if state is None else (kind, args, state)

    def __reduce__(self) -> Any:
        return self.reduced


def doubled(times: int) -> Any:
    """A pair of a pair of ..., whose elements are one object each: its hash, and an array of it, take forever."""
    value: Any = (1, 2)
    for _ in range(times):
        value = (value, value)
    return value


def write(folder: Path, edit: Callable[[Metadata], Any]) -> None:
    chunk, size = ChunkStorageMetadata(torch.Size((0, 0)), torch.Size((4, 8))), torch.Size((4, 8))
    metadata = Metadata({NAME: TensorStorageMetadata(PROPERTIES, size, [chunk])})
    metadata.storage_data = {MetadataIndex(NAME, chunk.offsets, 0): _StorageInfo("__0_0.distcp", 0, 128)}
    edit(metadata)
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    (folder / "__0_0.distcp").write_bytes(bytes(128))


def set_size(*args: Any) -> Callable[[Metadata], Any]:
    return lambda metadata: setattr(metadata.state_dict_metadata[NAME], "size", Called(torch.Size, *args))


def set_chunks(shape: list[int], chunks: list[tuple[list[int], list[int]]]) -> Callable[[Metadata], Any]:
    parts = [ChunkStorageMetadata(torch.Size(offset), torch.Size(sizes)) for offset, sizes in chunks]
    entry = TensorStorageMetadata(PROPERTIES, torch.Size(shape), parts)
    return lambda metadata: metadata.state_dict_metadata.update({NAME: entry})


def set_place(info: Any) -> Callable[[Metadata], Any]:
    return lambda metadata: metadata.storage_data.update(dict.fromkeys(metadata.storage_data, info))


def share_chunks(count: int) -> Callable[[Metadata], Any]:
    """Make tensors without elements, which all have the same list of chunks."""
    chunks = [ChunkStorageMetadata(torch.Size((0,)), torch.Size((0,)))] * count

    def edit(metadata: Metadata) -> None:
        for i in range(count):
            name = f"model.{i}.weight"
            metadata.state_dict_metadata[name] = TensorStorageMetadata(PROPERTIES, torch.Size((0,)), chunks)
            metadata.storage_data[MetadataIndex(name, torch.Size((0,)))] = _StorageInfo("__0_0.distcp", 0, 0)

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        *((set_size((rows, 8)), "a shape is none") for rows in (True, None, "4", -1, 1 << 62, (4,), doubled(60))),
        *((set_size(*args), "a shape is none") for args in ((doubled(60),), ((1,) * 65,), ([4, 8],), (4,))),
        *((set_size(*args), "cannot be read") for args in ((), ((4, 8), 1))),
        (set_chunks([1 << 61], [([0], [1 << 61])] * 9), "are not the whole tensor"),  # 2^61 in 64 bits
        (set_chunks([1 << 32, 1 << 32], []), "are not the whole tensor"),  # 0 in 64 bits
        (set_chunks([4, 8], [([0], [4])]), "lies outside of it"),
        (set_chunks([1 << 61], [([1 << 61], [(1 << 62) - 1])]), "lies outside of it"),
        (set_place(Called(_StorageInfo, state=(0, 0, 1 << 40))), "has a place that is none"),
        (set_place(_StorageInfo("__0_0.distcp", (1 << 62) - 1, (1 << 62) - 1)), "is cut short"),
        (set_place(_StorageInfo("__0_0.distcp", True, 128)), "has a place that is none"),
        (set_place(MetadataIndex(NAME)), "is in no file"),
        (
            lambda m: m.storage_data.update({Called(MetadataIndex, state=(doubled(60), 1)): None}),
            "a place has no name",
        ),
        (lambda m: m.storage_data.update({Called(MetadataIndex): None}), "a place has no name"),
        (
            lambda m: m.state_dict_metadata.update({NAME: Called(TensorStorageMetadata, state=((4, 8), 1, 2))}),
            "has no chunks",
        ),
        (
            lambda m: m.state_dict_metadata[NAME].chunks.append(
                Called(ChunkStorageMetadata, state=(doubled(60), doubled(60)))
            ),
            "a shape is none",
        ),
        (share_chunks(20_000), "more chunks than bytes for them"),
    ],
)
def test_what_is_made_to_mislead(tmp_path: Path, edit: Callable[[Metadata], Any], message: str) -> None:
    write(tmp_path, lambda metadata: None)
    assert read_metadata(tmp_path).keys() == {NAME}
    write(tmp_path, edit)
    with pytest.raises(ConfigError, match=message):
        read_metadata(tmp_path)


def test_what_nobody_uses_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, lambda metadata: setattr(metadata, "planner_data", {"a": doubled(60)}))
    assert read_metadata(tmp_path)[NAME].shape == (4, 8)
