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
from titanlite.checkpoint.writer_process import SentFile

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
    shape and dtype differ in the elements alone. So ``torch.save`` makes the first of them; the others are its head,
    their elements, and its tail. The bytes of the files are the same.
    """

    def __init__(self, folder: Path, files: HashingFileSystem) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        ends: dict[tuple[torch.dtype, torch.Size], tuple[bytes, bytes]] = {}
        results = []
        with self.fs.create_stream(self.fs.concat_path(self.path, name), "wb") as stream:
            for item in plan.items:
                data = planner.resolve_data(item)
                assert isinstance(data, Tensor)
                tensor = _with_storage_of_its_own(data.detach())
                key = tensor.dtype, tensor.shape
                if key not in ends:
                    ends[key] = head_and_tail(tensor)
                head, tail = ends[key]
                begin = stream.tell()
                for part in (head, bytes_of(tensor), tail):
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


def bytes_of(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


class _ArchiveWithoutElements(io.RawIOBase):
    """Keeps what is written before and after the elements of a tensor.

    Attributes:
        pieces: the head and the tail.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._begin, self._size = tensor.data_ptr(), tensor.nbytes
        self.pieces = [bytearray()]

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        if len(content) == self._size and np.frombuffer(content, np.uint8).ctypes.data == self._begin:
            self.pieces.append(bytearray())
        else:
            self.pieces[-1] += content
        return len(content)


def head_and_tail(tensor: Tensor) -> tuple[bytes, bytes]:
    """Return what stands before and after the elements in the archive of a tensor.

    Args:
        tensor: contiguous, with a storage of its own.

    Raises:
        RuntimeError: ``torch.save`` does not write the elements from where they are, all at once.
    """
    archive = _ArchiveWithoutElements(tensor)
    with _without_crc():
        torch.save(tensor, archive)  # type: ignore[arg-type]
    if len(archive.pieces) != 1 + (tensor.numel() > 0):
        raise RuntimeError(f"torch {torch.__version__} writes archives of tensors in another way: report this")
    head, *tail = archive.pieces
    return bytes(head), b"".join(tail)


def _without_crc() -> AbstractContextManager[None]:
    """CRC-32 adds nothing to SHA-256, and PyTorch holds the interpreter lock while it computes a CRC-32."""
    return config.patch({"save.compute_crc32": False})  # type: ignore[attr-defined, no-any-return]
