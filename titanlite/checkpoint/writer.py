"""A process that hashes and writes files, so that the thread of a save leaves Python to training."""

from __future__ import annotations

import contextlib
import io
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from titanlite.checkpoint import hashing_file
from titanlite.checkpoint.hashing_file import BYTES, END, MEMORY, MESSAGE, PATH

_ALIGNMENT = 64  # bytes
_SMALL = 1 << 12  # bytes: as many are sent without a look at where they are
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Writer:
    """Writes files by another process, which shares memory with this one.

    The process starts with the first file, and again after it has died. It ends with this process. The signals that ask
    a run to stop do not end it: the run ends after its save.

    Args:
        like: name -> a tensor, whose shape and dtype are those of one in the shared memory.

    Attributes:
        tensors: name -> uninitialized tensor in the shared memory.

    Raises:
        OSError: the system gives no memory to share.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        begins, size = {}, 0
        for name, tensor in like.items():
            begins[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._handle = os.memfd_create("checkpoint")
        os.ftruncate(self._handle, max(size, _ALIGNMENT))
        memory = mmap.mmap(self._handle, 0)
        self._begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._end = self._begin + size
        self.tensors = {name: _tensor_in(memory, begins[name], tensor) for name, tensor in like.items()}
        self._process: subprocess.Popen[bytes] | None = None

    def open(self, path: str | os.PathLike[str]) -> SentFile:
        """Create a file, of which one may be open at a time."""
        if self._process is None:
            self._process = self._started()
        return SentFile(self, path)

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-I", "-S", hashing_file.__file__, str(self._handle), str(os.getpid())]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # the new process inherits it
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._handle,), bufsize=1 << 16
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def place_of(self, content: memoryview) -> tuple[int, int] | None:
        """Return the begin and the end of ``content`` in the shared memory, if it is there and not small."""
        if len(content) <= _SMALL:
            return None
        begin = np.frombuffer(content, np.uint8).ctypes.data
        inside = self._begin <= begin and begin + len(content) <= self._end
        return (begin - self._begin, begin - self._begin + len(content)) if inside else None

    def send(self, kind: bytes, begin: int = 0, end: int = 0, content: bytes | memoryview = b"") -> None:
        """Send a message; see ``hashing_file.py``."""
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(MESSAGE.pack(kind, begin, end))
            self._process.stdin.write(content)
        except BrokenPipeError:
            raise self._died() from None

    def reply(self) -> dict[str, Any]:
        """Return the reply to a request."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._died() from None
        line = self._process.stdout.readline()
        if not line:
            raise self._died()
        return json.loads(line)  # type: ignore[no-any-return]

    def _died(self) -> OSError:
        status = self._stop()
        return OSError(f"the process that writes the files of the checkpoint ended with the status {status}")

    def _stop(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
        return process.wait()

    def close(self) -> None:
        """End the process. The tensors remain."""
        self._stop()
        os.close(self._handle)


def _tensor_in(memory: mmap.mmap, begin: int, like: Tensor) -> Tensor:
    if not like.numel():
        return torch.empty(like.shape, dtype=like.dtype)
    # Each has a storage of its own: PyTorch's writer copies a tensor that is a part of one.
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel(), offset=begin).view(like.shape)


class SentFile(io.RawIOBase):
    """A new file that the process of a :class:`Writer` writes. Its contents in the shared memory are not sent: they
    must not change until it is closed.

    Attributes:
        digest: the SHA-256; ``close()`` sets it.
        error: what ended the process.
    """

    def __init__(self, writer: Writer, path: str | os.PathLike[str]) -> None:
        self._writer, self._path, self._size = writer, os.fsencode(path), 0
        self.digest = ""
        self.error: OSError | None = None
        writer.send(PATH, len(self._path), content=self._path)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        try:
            if place := self._writer.place_of(content):
                self._writer.send(MEMORY, *place)
            else:
                self._writer.send(BYTES, len(content), content=content)
        except OSError as e:
            self.error = self.error or e
            raise
        self._size += len(content)
        return len(content)

    def tell(self) -> int:
        return self._size

    def close(self) -> None:
        """Wait until the file is on the disk.

        Raises:
            OSError: it could not be written.
        """
        if self.closed:
            return
        super().close()
        if self.error is not None:
            raise self.error
        self._writer.send(END)
        reply = self._writer.reply()
        if "error" in reply:
            raise OSError(reply["number"], reply["error"], os.fsdecode(self._path))
        self.digest = reply["digest"]
