"""Read ``.metadata`` of a folder of ``torch.distributed.checkpoint`` (DCP): which tensor is where.

The file is a pickle. It is read as data (:mod:`titanlite.untrusted.pickles`), and every value is checked: DCP's own
reader would run whatever the file names.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from titanlite.checkpoint.folder import SUMS, DamagedCheckpoint, read_sums
from titanlite.quant.stored import SCALES
from titanlite.untrusted.files import Untrusted, contained, open_file, read_bytes
from titanlite.untrusted.pickles import Record, read_pickle
from titanlite.untrusted.rows import Kept

METADATA = ".metadata"
DTYPES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_DCP = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_PATHS = {f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")}
_KINDS = {
    *(f"{_DCP}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_DCP}.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    f"{_DCP}._MEM_FORMAT_ENCODING",
    # Early releases of Python 3.11 (Debian 12 has 3.11.2) name members of an Enum so; the second in protocol 2.
    *("builtins.getattr", "__builtin__.getattr"),
    _STORAGE,
    *("torch.Size", "torch.serialization._get_layout"),
    *DTYPES,
    *_PATHS,
}
_MOST_DIMS = 64
_MOST_BYTES = 2 << 30
_MOST = 1 << 62  # so that the sum of two numbers has 64 bits
_LEAST_OF_CHUNK = 32  # bytes of the file; those of DCP take about 200

Numbers = np.ndarray[Any, np.dtype[np.int64]]


class Chunk(NamedTuple):
    """A part of a tensor: its place and shape in the tensor, and the bytes of a file that hold it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, eq=False)
class Chunks:
    """The chunks of a tensor, in columns: those of a checkpoint of a thousand ranks are millions.

    Attributes:
        offsets, sizes: where each lies in the tensor, int64 [chunks, dimensions].
        places: the file, as an index into ``files``, the first byte in it and the number of bytes, int64 [chunks, 3].
        files: the names of all files of the checkpoint that hold tensors.
    """

    offsets: Numbers
    sizes: Numbers
    places: Numbers
    files: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Chunk]:
        return map(self._chunk, range(len(self)))

    def _chunk(self, row: int) -> Chunk:
        file, start, length = self.places[row].tolist()
        return Chunk(
            tuple(self.offsets[row].tolist()), tuple(self.sizes[row].tolist()), self.files[file], start, length
        )

    @property
    def num_bytes(self) -> int:
        return sum(self.places[:, 2].tolist())

    def within(self, offset: Sequence[int], shape: Sequence[int]) -> Iterator[tuple[Chunk, list[int], list[int]]]:
        """Yield each chunk that shares elements with a part of the tensor, and the offset and the sizes, in the tensor,
        of what they share."""
        begins = np.maximum(self.offsets, np.array(offset, dtype=np.int64))
        ends = np.minimum(self.offsets + self.sizes, np.array(offset, dtype=np.int64) + np.array(shape, dtype=np.int64))
        for row in np.flatnonzero((begins < ends).all(axis=1)).tolist():
            yield self._chunk(row), begins[row].tolist(), (ends[row] - begins[row]).tolist()


class SavedTensor(NamedTuple):
    """The shape of a tensor, and the chunks that it is made of. Beside the data of a weight that is stored quantized
    are the scales of its rows."""

    shape: torch.Size
    chunks: Chunks
    scale: SavedTensor | None = None


def read_metadata(folder: Path) -> dict[str, SavedTensor]:
    """Return tensor name -> where it is. Entries that are no tensors are left out: nothing here reads them.

    Raises:
        DamagedCheckpoint: the file is missing, damaged, or asks for what a checkpoint does not need.
    """
    collects = gc.isenabled()
    gc.disable()  # it would walk over millions of records again and again: a third of the time
    try:
        return _Reader(folder).read()
    except FileNotFoundError as e:
        raise DamagedCheckpoint(folder, [f"{Path(e.filename).name} is missing"]) from None
    except (Untrusted, OSError) as e:
        raise DamagedCheckpoint(folder, [str(e)]) from None
    finally:
        if collects:
            gc.enable()


class _Shape(tuple[int, ...]):
    """The numbers of a ``torch.Size``, checked."""

    __slots__ = ()


class _Parts(NamedTuple):
    """The state of an entry that is a tensor: its shape, and the offsets and sizes of its chunks."""

    shape: _Shape
    offsets: Numbers
    sizes: Numbers


def _shape(sizes: Any) -> _Shape:
    if type(sizes) is not tuple or len(sizes) > _MOST_DIMS or not all(map(_is_count, sizes)):
        raise ValueError("a shape is none")
    return _Shape(sizes)


# What is kept of the objects while the file is read, so that few of them are alive at once. Which tensor they belong to
# is known later: a text says what is wrong.


def _kept_of_chunk(offset: Any, sizes: Any) -> tuple[_Shape, _Shape] | None:
    return (offset, sizes) if type(offset) is type(sizes) is _Shape else None


def _kept_of_index(name: Any, index: Any, offset: Any = None) -> tuple[str, _Shape | None] | None:
    return (name, offset) if type(name) is str and (offset is None or type(offset) is _Shape) else None


def _matrix(rows: Sequence[Sequence[int]], columns: int) -> Numbers:
    numbers = np.fromiter(chain.from_iterable(rows), dtype=np.int64, count=len(rows) * columns)
    return numbers.reshape(len(rows), columns)


def _joined(offsets: Numbers, places: Sequence[tuple[_Shape, Any]]) -> list[Any]:
    """Return what stands in ``places`` at the offset of each chunk, or what is wrong. The last of two counts."""
    fitting = [(offset, place) for offset, place in places if len(offset) == offsets.shape[1]]
    rows = _matrix([offset for offset, _ in fitting], offsets.shape[1])
    if rows.shape == offsets.shape and (rows == offsets).all():
        return [place for _, place in fitting]
    # Bytes are hashed with a secret. Numbers could be chosen so that all have the same hash.
    by_offset = {row.tobytes(): place for row, (_, place) in zip(rows, fitting)}
    return [by_offset.get(row.tobytes(), "is in no file") for row in offsets]


class _Reader:
    """Makes the tensors of a folder of what ``.metadata`` holds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / METADATA
        self._verified = read_sums(folder).keys() if (folder / SUMS).exists() else None
        self._chunks = self._most_chunks = 0
        self._numbers: dict[str, int] = {}  # file -> its index in what follows
        self._files: tuple[str, ...] = ()
        self._sizes = np.zeros(0, dtype=np.int64)  # of files that have tensors; -1: not looked at yet
        self._used = np.zeros(0)  # the bytes of each that are of a tensor; a float64 cannot overflow

    def read(self) -> dict[str, SavedTensor]:
        places = ("relative_path", "offset", "length", "transform_descriptors")
        states = {
            f"{_DCP}.TensorStorageMetadata": Kept(("size", "chunks"), self._kept_of_tensor),
            f"{_DCP}.ChunkStorageMetadata": Kept(("offsets", "sizes"), _kept_of_chunk, is_row=True),
            f"{_DCP}.MetadataIndex": Kept(("fqn", "index", "offset"), _kept_of_index, is_row=True),
            _STORAGE: Kept(places, self._kept_of_place, is_row=True),
        }
        data = read_bytes(contained(self._folder, METADATA), _MOST_BYTES)
        self._most_chunks = len(data) // _LEAST_OF_CHUNK
        content = read_pickle(data, _KINDS, self._file, values={"torch.Size": _shape}, states=states)
        if not isinstance(content, Record) or content.kind != f"{_DCP}.Metadata" or type(content.state) is not dict:
            raise self._wrong("it has another thing in the place of Metadata")
        entries, storage = content.state.get("state_dict_metadata"), content.state.get("storage_data")
        if type(entries) is not dict or type(storage) is not dict:
            raise self._wrong("it has no entries")
        return self._tensors(entries, storage)

    def _kept_of_tensor(self, shape: Any, chunks: Any) -> _Parts | str:
        if type(chunks) is not list:
            return "has no chunks"
        self._count(len(chunks))
        kind = f"{_DCP}.ChunkStorageMetadata"
        boxes: list[Any] = [
            chunk.state if isinstance(chunk, Record) and chunk.kind == kind else None for chunk in chunks
        ]
        if type(shape) is not _Shape or not all(boxes):
            return "has chunks of which a shape is none"
        columns = [[box[i] for box in boxes] for i in (0, 1)]
        if {len(row) for column in columns for row in column} - {len(shape)}:
            return "has a chunk that lies outside of it"
        return _Parts(shape, *(_matrix(column, len(shape)) for column in columns))

    def _kept_of_place(self, file: Any, start: Any, length: Any, transforms: Any = None) -> tuple[int, int, int] | str:
        if transforms:
            return "was compressed, which is not read"
        if type(file) is not str or not _is_count(start) or not _is_count(length):
            return "has a place that is none"
        return self._numbers.setdefault(file, len(self._numbers)), start, length

    def _count(self, chunks: int) -> None:
        """Count chunks. A list of many takes few bytes in each of many tensors that share it."""
        self._chunks += chunks
        if self._chunks > self._most_chunks:
            raise self._wrong("it has more chunks than bytes for them")

    def _tensors(self, entries: dict[Any, Any], storage: dict[Any, Any]) -> dict[str, SavedTensor]:
        places: dict[str, list[tuple[_Shape, Any]]] = {}
        while storage:  # from its end, and lets go of what has been looked at
            index, info = storage.popitem()
            if not isinstance(index, Record) or index.kind != f"{_DCP}.MetadataIndex" or type(index.state) is not tuple:
                raise self._wrong("a place has no name, or none in its tensor")
            name, offset = index.state
            if offset is not None:
                place = info.state if isinstance(info, Record) and info.kind == _STORAGE else None
                places.setdefault(name, []).append((offset, place or "is in no file"))
        self._files = tuple(self._numbers)
        self._sizes, self._used = np.full(len(self._files), -1), np.zeros(len(self._files))
        tensors = {}
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, Record):
                raise self._wrong(f"the entry {str(name)[:100]!r} is none")
            if entry.kind == f"{_DCP}.TensorStorageMetadata":
                tensors[name] = self._tensor(name, entry.state, places.pop(name, [])[::-1])
        return self._with_scales(tensors)

    def _with_scales(self, tensors: dict[str, SavedTensor]) -> dict[str, SavedTensor]:
        """Return ``tensors`` with those that are scales of a weight's rows beside the weight."""
        for name in [name for name in tensors if name.endswith(f".weight{SCALES}")]:
            weight = tensors.get(name.removesuffix(SCALES))
            if weight is None or len(weight.shape) != 2 or tensors[name].shape != (weight.shape[0], 1):
                raise self._wrong(f"{name} is no scale of the rows of a weight")
            tensors[name.removesuffix(SCALES)] = weight._replace(scale=tensors.pop(name))
        return tensors

    def _tensor(self, name: str, parts: Any, places: list[tuple[_Shape, Any]]) -> SavedTensor:
        if type(parts) is not _Parts:
            raise self._wrong(f"{name} {parts or 'is none'}")
        shape, offsets, sizes = parts
        self._count(len(offsets))
        if (offsets + sizes > np.array(shape, dtype=np.int64)).any():
            raise self._wrong(f"a chunk of {name} lies outside of it")
        # Below 2^63, that of a chunk cannot overflow: it is no larger than that of the tensor.
        elements = sizes.prod(axis=1, dtype=np.int64)
        if prod(shape) >= _MOST or sum(elements.tolist()) != prod(shape):
            raise self._wrong(f"the chunks of {name} are not the whole tensor")
        rows = _joined(offsets, places)
        if problem := next((row for row in rows if type(row) is not tuple), ""):
            raise self._wrong(f"{name} {problem}")
        chunks = Chunks(offsets, sizes, _matrix(rows, 3), self._files)
        self._check_places(name, elements, chunks)
        return SavedTensor(torch.Size(shape), chunks)

    def _check_places(self, name: str, elements: Numbers, chunks: Chunks) -> None:
        """Check that the files have the bytes of the chunks, and no more of them."""
        files, starts, lengths = chunks.places.T
        for number in np.unique(files[self._sizes[files] < 0]).tolist():
            self._sizes[number] = self._size_of(self._files[number])

        def first(wrong: Any) -> str:
            return self._files[files[np.argmax(wrong)]]

        if (beyond := starts + lengths > self._sizes[files]).any():
            raise self._wrong(f"{first(beyond)} is cut short: {name} would lie beyond its end")
        np.add.at(self._used, files, lengths)
        # Else a small file could claim to be a large tensor.
        if (shared := self._used[files] > self._sizes[files]).any():
            raise self._wrong(f"{name} shares its bytes of {first(shared)} with another tensor")
        if (short := elements > lengths).any():  # an element has a byte or more
            row = int(np.argmax(short))
            raise self._wrong(f"{name} has {elements[row]} elements in {lengths[row]} bytes of {first(short)}")

    def _size_of(self, file: str) -> int:
        if self._verified is not None and file not in self._verified:
            raise Untrusted(self._file, f"{file[:200]!r} has tensors and is not in {SUMS}")
        with open_file(contained(self._folder, file)) as stream:
            return stream.seek(0, 2)

    def _wrong(self, problem: str) -> Untrusted:
        return Untrusted(self._file, problem)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST
