"""Read ``.metadata`` of a folder of ``torch.distributed.checkpoint`` (DCP): which tensor is where.

The file is a pickle. It is read as data (:mod:`titanlite.untrusted.pickles`), and every value is checked: DCP's own
reader would run whatever the file names.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titanlite.checkpoint.folder import SUMS, DamagedCheckpoint, read_sums
from titanlite.quant.stored import SCALES
from titanlite.untrusted.files import Untrusted, contained, open_file, read_bytes
from titanlite.untrusted.pickles import Record, read_pickle

METADATA = ".metadata"
DTYPES = {f"torch.{name}" for name, value in vars(torch).items() if isinstance(value, torch.dtype)}

_DCP = "torch.distributed.checkpoint.metadata"
_STORAGE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_PATHS = {f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")}
_KINDS = {
    *(f"{_DCP}.{name}" for name in ("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties")),
    *(f"{_DCP}.{name}" for name in ("TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata")),
    f"{_DCP}._MEM_FORMAT_ENCODING",
    "builtins.getattr",  # the first releases of Python 3.11 (Debian 12 has 3.11.2) name members of an Enum so
    _STORAGE,
    *("torch.Size", "torch.serialization._get_layout"),
    *DTYPES,
    *_PATHS,
}
_MOST_DIMS = 64
_MOST_BYTES = 2 << 30


class Chunk(NamedTuple):
    """A part of a tensor: its place and shape in the tensor, and the bytes of a file that hold it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


class SavedTensor(NamedTuple):
    """The shape of a tensor, and the chunks that it is made of. Beside the data of a weight that is stored quantized
    are the scales of its rows."""

    shape: torch.Size
    chunks: list[Chunk]
    scale: SavedTensor | None = None


def read_metadata(folder: Path) -> dict[str, SavedTensor]:
    """Return tensor name -> where it is. Entries that are no tensors are left out: nothing here reads them.

    Raises:
        DamagedCheckpoint: the file is missing, damaged, or asks for what a checkpoint does not need.
    """
    collects = gc.isenabled()
    gc.disable()  # it would walk over millions of records again and again: a third of the time
    try:
        content = read_pickle(read_bytes(contained(folder, METADATA), _MOST_BYTES), _KINDS, folder / METADATA)
        return _Reader(folder).tensors(content)
    except FileNotFoundError as e:
        raise DamagedCheckpoint(folder, [f"{Path(e.filename).name} is missing"]) from None
    except (Untrusted, OSError) as e:
        raise DamagedCheckpoint(folder, [str(e)]) from None
    finally:
        if collects:
            gc.enable()


class _Reader:
    """Makes the tensors of a folder of what ``.metadata`` holds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / METADATA
        self._sizes: dict[str, int] = {}
        self._read: Counter[str] = Counter()  # file -> the bytes of it that are a tensor
        self._verified = read_sums(folder).keys() if (folder / SUMS).exists() else None

    def tensors(self, content: Any) -> dict[str, SavedTensor]:
        fields = self._state(content, "Metadata")
        entries, storage = fields.get("state_dict_metadata"), fields.get("storage_data")
        if not isinstance(entries, dict) or not isinstance(storage, dict):
            raise self._wrong("it has no entries")
        places = {}
        for index, info in storage.items():
            key = self._state(index, "MetadataIndex")
            name, offset = key.get("fqn"), key.get("offset")
            if not isinstance(name, str):  # the hash of a nested tuple can take forever
                raise self._wrong("a place has no name")
            places[name, None if offset is None else self._size(offset)] = info
        tensors = {}
        for name, entry in entries.items():
            if not isinstance(name, str) or not isinstance(entry, Record):
                raise self._wrong(f"the entry {str(name)[:100]!r} is none")
            if entry.kind == f"{_DCP}.TensorStorageMetadata":
                tensors[name] = self._tensor(name, entry, places)
        return self._with_scales(tensors)

    def _with_scales(self, tensors: dict[str, SavedTensor]) -> dict[str, SavedTensor]:
        """Return ``tensors`` with those that are scales of a weight's rows beside the weight."""
        for name in [name for name in tensors if name.endswith(f".weight{SCALES}")]:
            weight = tensors.get(name.removesuffix(SCALES))
            if weight is None or len(weight.shape) != 2 or tensors[name].shape != (weight.shape[0], 1):
                raise self._wrong(f"{name} is no scale of the rows of a weight")
            tensors[name.removesuffix(SCALES)] = weight._replace(scale=tensors.pop(name))
        return tensors

    def _tensor(self, name: str, entry: Record, places: Mapping[Any, Any]) -> SavedTensor:
        fields = self._state(entry, "TensorStorageMetadata")
        shape, parts = self._size(fields.get("size")), fields.get("chunks")
        if not isinstance(parts, list):
            raise self._wrong(f"{name} has no chunks")
        chunks = []
        for part in parts:
            chunk = self._state(part, "ChunkStorageMetadata")
            offset, sizes = self._size(chunk.get("offsets")), self._size(chunk.get("sizes"))
            if not len(offset) == len(sizes) == len(shape) or any(o + n > s for o, n, s in zip(offset, sizes, shape)):
                raise self._wrong(f"a chunk of {name} lies outside of it")
            chunks.append(Chunk(offset, sizes, *self._place(name, prod(sizes), places.get((name, offset)))))
        if sum(prod(chunk.shape) for chunk in chunks) != prod(shape):
            raise self._wrong(f"the chunks of {name} are not the whole tensor")
        return SavedTensor(torch.Size(shape), chunks)

    def _place(self, name: str, elements: int, info: Any) -> tuple[str, int, int]:
        """Return the file, start and length of a chunk of so many elements."""
        if not isinstance(info, Record) or info.kind != _STORAGE or not isinstance(info.state, dict):
            raise self._wrong(f"{name} is in no file")
        file: Any = info.state.get("relative_path")
        start: Any = info.state.get("offset")
        length: Any = info.state.get("length")
        if info.state.get("transform_descriptors"):
            raise self._wrong(f"{name} was compressed, which is not read")
        if not isinstance(file, str) or not _is_count(start) or not _is_count(length):
            raise self._wrong(f"the place of {name} is none")
        if file not in self._sizes:
            if self._verified is not None and file not in self._verified:
                raise Untrusted(self._file, f"{file[:200]!r} has tensors and is not in {SUMS}")
            with open_file(contained(self._folder, file)) as stream:
                self._sizes[file] = stream.seek(0, 2)
        if start + length > self._sizes[file]:
            raise self._wrong(f"{file} is cut short: {name} would lie beyond its end")
        self._read[file] += length
        if self._read[file] > self._sizes[file]:  # else a small file could claim to be a large tensor
            raise self._wrong(f"{name} shares its bytes of {file} with another tensor")
        if elements > length:  # an element has a byte or more
            raise self._wrong(f"{name} has {elements} elements in {length} bytes of {file}")
        return file, start, length

    def _state(self, record: Any, kind: str) -> dict[str, Any]:
        if not isinstance(record, Record) or record.kind != f"{_DCP}.{kind}" or not isinstance(record.state, dict):
            raise self._wrong(f"it has another thing in the place of {kind}")
        return record.state

    def _size(self, record: Any) -> tuple[int, ...]:
        sizes = record.args[0] if isinstance(record, Record) and record.kind == "torch.Size" and record.args else None
        if not isinstance(sizes, tuple) or len(sizes) > _MOST_DIMS or not all(map(_is_count, sizes)):
            raise self._wrong("a shape is none")
        return sizes

    def _wrong(self, problem: str) -> Untrusted:
        return Untrusted(self._file, problem)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62
