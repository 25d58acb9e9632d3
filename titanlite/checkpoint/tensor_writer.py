"""Write the tensors of one process into a ``.distcp`` file, as DCP does: ``torch.save`` archives, one after another."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from torch.utils.serialization import config

from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.writer import SentFile

_COPY_AHEAD = 10_000_000  # bytes
NewFile = Callable[[str | os.PathLike[str]], HashingFile | SentFile]


class HashingFileSystem(FileSystem):
    """DCP's file system, which also computes the SHA-256 of each file during writing.

    Attributes:
        sums: file name -> SHA-256 (hexadecimal).
    """

    def __init__(self, new_file: NewFile) -> None:
        self.sums: dict[str, str] = {}
        self._new_file = new_file

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        file = self._new_file(path)
        try:
            yield file  # type: ignore[misc]
        except RuntimeError as e:
            if file.error is None:
                raise
            raise file.error from e
        finally:
            file.close()
        self.sums[Path(path).name] = file.digest

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.sums[Path(new_path).name] = self.sums.pop(Path(path).name)


class DeviceTensorWriter(FileSystemWriter):
    """DCP's writer for tensors on devices: it copies some ahead, to overlap copies with writing, and for that waits for
    the training stream."""

    def __init__(self, folder: Path, files: HashingFileSystem) -> None:
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=_COPY_AHEAD)  # the files do that
        self.fs = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        with _without_crc():
            return super().write_data(plan, planner)


class HostTensorWriter(FileSystemWriter):
    """DCP's writer for tensors that are all in host memory.

    DCP calls ``torch.save`` for each tensor, which takes half a millisecond of Python and forty writes. Archives of one
    shape and dtype differ in the elements alone. So ``torch.save`` makes one of them, and the others are what stands
    before its elements, theirs, and what stands after. The bytes of the files are the same.
    """

    def __init__(self, folder: Path, files: HashingFileSystem) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        frames: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                tensor = _with_storage_of_its_own(data.detach())
                key = tensor.dtype, tensor.shape
                if key not in frames:
                    frames[key] = _around_elements(tensor)
                before, after = frames[key]
                begin = stream.tell()
                for part in (before, _bytes_of(tensor), after):
                    stream.write(part)
                length = stream.tell() - begin
                results.append(WriteResult(item.index, length, _StorageInfo(name, begin, length)))
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future


def _with_storage_of_its_own(tensor: Tensor) -> Tensor:
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _Pieces(io.RawIOBase):
    """Keeps what is written before and after the bytes at one address."""

    def __init__(self, address: int, size: int) -> None:
        self._address, self._size = address, size
        self.before_and_after = [bytearray()]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        if len(content) == self._size and np.frombuffer(content, np.uint8).ctypes.data == self._address:
            self.before_and_after.append(bytearray())
        else:
            self.before_and_after[-1] += content
        return len(content)


def _around_elements(tensor: Tensor) -> tuple[bytes, bytes]:
    """Return what stands before and after the elements in the archive of ``tensor``, which has a storage of its own."""
    pieces = _Pieces(tensor.data_ptr(), tensor.nbytes)
    with _without_crc():
        torch.save(tensor, pieces)  # type: ignore[arg-type]
    before, *after = pieces.before_and_after
    return bytes(before), b"".join(after)


def _without_crc() -> AbstractContextManager[None]:
    """CRC-32 adds nothing to SHA-256, and PyTorch holds the interpreter lock while it computes a CRC-32."""
    return config.patch({"save.compute_crc32": False})  # type: ignore[attr-defined, no-any-return]
