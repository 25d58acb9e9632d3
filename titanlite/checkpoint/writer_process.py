"""A process that hashes and writes files, so that the thread of a save leaves Python to training."""

from __future__ import annotations

import contextlib
import io
import json
import logging
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

logger = logging.getLogger()

_ALIGNMENT = 64  # bytes
_SMALL = 1 << 12  # bytes: contents of this size or less go through the pipe, wherever they lie


class WriterProcess:
    """Writes files by another process, which shares memory with this one.

    The other process ends when this one does. Signals other than SIGKILL do not end it: a run that is asked to stop
    finishes its save. If it dies, the next file starts another one.

    Args:
        state: name -> a tensor; the shared memory gets one of its shape and dtype.

    Attributes:
        tensors: name -> uninitialized tensor in the shared memory.

    Raises:
        OSError: the system gives no memory to share, or the process does not start.
    """

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        begins, size = {}, 0
        for name, tensor in state.items():
            begins[name] = size
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._handle = os.memfd_create("checkpoint")
        try:
            os.ftruncate(self._handle, max(size, _ALIGNMENT))
            memory = mmap.mmap(self._handle, 0)
            self._process = self._started()
        except BaseException:
            os.close(self._handle)
            raise
        self._memory_begin = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        self._memory_end = self._memory_begin + size
        self.tensors = {name: _tensor_in(memory, begins[name], tensor) for name, tensor in state.items()}
        self._file: SentFile | None = None

    def open(self, path: str | os.PathLike[str]) -> SentFile:
        """Create a file.

        Raises:
            RuntimeError: another one is open.
            OSError: the process has died and does not start again. A file that cannot be created fails when it is
                closed.
        """
        if self._file is not None and not self._file.closed:
            raise RuntimeError(f"{os.fsdecode(path)}: another file is open")
        if (status := self._process.poll()) is not None:
            logger.warning("the process that writes checkpoints ended with the status %d; another one starts", status)
            self._end_process()
            self._process = self._started()
        self._file = SentFile(self, path)
        return self._file

    def _started(self) -> subprocess.Popen[bytes]:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("there is no Python interpreter to start")
        command = [sys.executable, "-I", "-S", hashing_file.__file__, str(self._handle), str(os.getpid())]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the new process inherits it
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(self._handle,), bufsize=1 << 16
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert process.stdout is not None
        if not process.stdout.readline():  # it says that it is ready
            process.communicate()
            raise OSError(f"{' '.join(command[:4])} ended with the status {process.returncode}")
        return process

    def place_of(self, content: memoryview) -> tuple[int, int] | None:
        """Return the begin and the end of ``content`` in the shared memory, in bytes; None: small, or elsewhere."""
        if len(content) <= _SMALL:
            return None
        begin = np.frombuffer(content, np.uint8).ctypes.data
        inside = self._memory_begin <= begin and begin + len(content) <= self._memory_end
        return (begin - self._memory_begin, begin - self._memory_begin + len(content)) if inside else None

    def send(self, kind: bytes, begin: int = 0, end: int = 0, content: bytes | memoryview = b"") -> None:
        """Send a message; see ``hashing_file.py``.

        Raises:
            OSError: the process has died.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(MESSAGE.pack(kind, begin, end))
            self._process.stdin.write(content)
        except (BrokenPipeError, ValueError):  # ValueError: closed, after it has died
            raise self._died() from None

    def reply(self) -> dict[str, Any]:
        """Return the reply to a request.

        Raises:
            OSError: the process has died.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except (BrokenPipeError, ValueError):
            raise self._died() from None
        if not line:
            raise self._died()
        return json.loads(line)  # type: ignore[no-any-return]

    def _died(self) -> OSError:
        status = self._end_process()
        return OSError(f"the process that writes the files of the checkpoint ended with the status {status}")

    def _end_process(self) -> int:
        """Return the status of the process, which is killed if it does not end by itself."""
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return self._process.wait()

    def close(self) -> None:
        """End the process. The tensors remain."""
        # Without a wait for it to read the end of the pipe, whose other end processes that were forked may have.
        self._process.kill()
        self._end_process()
        os.close(self._handle)


def _tensor_in(memory: mmap.mmap, begin: int, template: Tensor) -> Tensor:
    """Return a tensor of the shape and dtype of ``template`` at a place of ``memory``, with a storage of its own, as
    :class:`HostTensorWriter` wants it."""
    if not template.numel():
        return torch.empty(template.shape, dtype=template.dtype)
    flat = torch.frombuffer(memory, dtype=template.dtype, count=template.numel(), offset=begin)
    return flat.view(template.shape)


class SentFile(io.RawIOBase):
    """A new file that a :class:`WriterProcess` writes. Its contents in the shared memory are not sent: they must not
    change until it is closed.

    Attributes:
        digest: the SHA-256 (hexadecimal); ``close()`` sets it.
        error: the error of a write, which means that the process has died.
    """

    def __init__(self, process: WriterProcess, path: str | os.PathLike[str]) -> None:
        self._process, self._path, self._size = process, os.fsencode(path), 0
        self.digest = ""
        self.error: OSError | None = None
        self._send(PATH, len(self._path), content=self._path)

    def _send(self, kind: bytes, begin: int = 0, end: int = 0, content: bytes | memoryview = b"") -> None:
        try:
            self._process.send(kind, begin, end, content)
        except OSError as e:
            self.error = e
            raise

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        if place := self._process.place_of(content):
            self._send(MEMORY, *place)
        else:
            self._send(BYTES, len(content), content=content)
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
        self._process.send(END)
        reply = self._process.reply()
        if "error" in reply:
            raise OSError(reply["number"], reply["error"], os.fsdecode(self._path))
        self.digest = reply["digest"]
