"""Read tensors of ``.distcp`` files: ``torch.save`` archives, one after the other.

An archive is a zip file of stored members: ``data.pkl`` says which tensor it is, ``data/<n>`` holds its bytes. Both are
read here as data. ``torch.load`` with ``weights_only=True`` runs no code either, but believes the sizes that it reads.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from titanlite.checkpoint.metadata import DTYPES
from titanlite.errors import ConfigError
from titanlite.untrusted.files import Untrusted
from titanlite.untrusted.pickles import Record, read_pickle

_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
}
_V2, _V3, _UNTYPED = (
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_tensor_v3",
    "torch.storage.UntypedStorage",
)
_KINDS = {*_STORAGES, *DTYPES, _V2, _V3, _UNTYPED, "collections.OrderedDict"}
_LOCAL_HEADER = 30  # bytes of a zip file before the name of a member; the lengths of the name and the extra are last


class _Part(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, stream: BinaryIO, start: int, length: int) -> None:
        self._stream, self._start, self._length, self._at = stream, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        count = max(0, min(len(buffer), self._length - self._at))
        self._stream.seek(self._start + self._at)
        read = self._stream.readinto(memoryview(buffer)[:count])  # type: ignore[attr-defined]
        self._at += read
        return int(read)


class _Archive:
    """The members of an archive. They are stored as they are: no member is larger than the archive."""

    def __init__(self, part: _Part, length: int) -> None:
        self._part, self._length = part, length
        self._members = {m.filename.partition("/")[2]: m for m in zipfile.ZipFile(part).infolist()}

    def __contains__(self, name: str) -> bool:
        return name in self._members

    def size(self, name: str) -> int:
        member = self._members[name]
        if member.compress_type != zipfile.ZIP_STORED or not 0 <= member.file_size <= self._length:
            raise ValueError(f"{name} is compressed, or larger than the archive")
        return member.file_size

    def read(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes of a member from ``start`` on."""
        if not 0 <= start <= start + len(buffer) <= self.size(name):
            raise ValueError(f"the tensor is larger than {name}")
        header = bytearray(_LOCAL_HEADER)
        begin = self._members[name].header_offset
        self._fill(begin, memoryview(header))
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        self._fill(begin + _LOCAL_HEADER + names + start, buffer)

    def _fill(self, start: int, buffer: memoryview) -> None:
        self._part.seek(start)
        filled = 0
        while filled < len(buffer):
            read = self._part.readinto(buffer[filled:])
            if not read:
                raise EOFError("it ends early")
            filled += read

    def text(self, name: str) -> bytes:
        content = bytearray(self.size(name))
        self.read(name, 0, memoryview(content))
        return bytes(content)


def read_tensor(
    stream: BinaryIO, start: int, length: int, shape: Sequence[int], offset: Sequence[int], sizes: Sequence[int]
) -> Tensor:
    """Read a part of a saved tensor.

    Args:
        stream, start, length: the file, and the bytes of it that are the archive.
        shape: that of the saved tensor.
        offset, sizes: the part to read.

    Returns:
        A tensor of the shape ``sizes``, on the CPU.

    Raises:
        Untrusted: these bytes are no such tensor.
    """
    file = Path(stream.name)
    try:
        archive = _Archive(_Part(stream, start, length), length)
        if "byteorder" in archive and archive.text("byteorder").decode() != sys.byteorder:
            raise ValueError("its bytes are in another order")
        saved = read_pickle(archive.text("data.pkl"), _KINDS, file)
        dtype, key, first, strides = _described(saved, tuple(shape))
        first += sum(o * s for o, s in zip(offset, strides))
        count = sum((n - 1) * s for n, s in zip(sizes, strides)) + 1 if all(sizes) else 0
        if count * dtype.itemsize > length:
            raise ValueError("the tensor is larger than the archive")
        data = torch.empty(count * dtype.itemsize, dtype=torch.uint8)
        if count:
            archive.read(f"data/{key}", first * dtype.itemsize, data.numpy().data)
        return data.view(dtype).as_strided(tuple(sizes), strides)
    except (ConfigError, OSError):
        raise
    except Exception as e:  # what fails on damaged bytes is open
        raise Untrusted(file, f"cannot be read at byte {start} ({type(e).__name__}: {str(e)[:200]})") from None


def _described(saved: Any, shape: tuple[int, ...]) -> tuple[torch.dtype, str, int, tuple[int, ...]]:
    """Return the dtype, the name of the bytes, the first element and the strides of a tensor of this ``shape``."""
    if not isinstance(saved, Record) or saved.kind not in (_V2, _V3):
        raise ValueError("it is no tensor")
    (_, storage, key, _, _), first, sizes, strides, *rest = saved.args
    if saved.kind == _V3:
        dtype = getattr(torch, rest[2].kind.removeprefix("torch."))
    else:
        dtype = _STORAGES[storage.kind]
    if not isinstance(key, str) or not isinstance(sizes, tuple) or not all(type(size) is int for size in sizes):
        raise ValueError("its name or its shape is none")
    if sizes != shape:
        raise ValueError(f"the tensor has the shape {sizes}, and {shape} in .metadata")
    numbers = (first, *strides)
    if len(strides) != len(shape) or not all(type(number) is int and 0 <= number < 1 << 62 for number in numbers):
        raise ValueError("its strides are none")
    return dtype, key, first, strides
