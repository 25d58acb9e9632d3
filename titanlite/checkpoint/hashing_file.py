"""Files that are hashed during writing, and the program of the process that writes such files.

The process writes one file after the other, of memory that it shares with its parent (``writer_process.py``). It runs
this file as a script, without packages, which would take memory and time. So only the standard library is imported.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

_PART = 1 << 18  # bytes: in the cache of a processor, so that hashing and writing read the memory once


class HashingFile(io.RawIOBase):
    """A new file that computes the SHA-256 of its contents during writing. ``close()`` flushes it to disk.

    Attributes:
        digest: the SHA-256; ``close()`` sets it.
        error: the first error of a write. PyTorch's writer of archives hides it behind one of its own.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb", buffering=_PART // 4)  # noqa: SIM115  (closed by close)
        self._hash = hashlib.sha256()
        self.digest = ""
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        content = memoryview(data).cast("B")
        for begin in range(0, len(content), _PART):
            part = content[begin : begin + _PART]
            self._hash.update(part)
            try:
                self._file.write(part)
            except OSError as e:
                self.error = self.error or e
                raise
        return len(content)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        if self.closed:
            return
        super().close()
        with self._file as file:
            file.flush()
            os.fsync(file.fileno())
        self.digest = self._hash.hexdigest()


# ---- the program
#
# A line says that it is ready. A request is messages, each of a kind and two numbers: PATH (the number of bytes that
# follow, and 0) once, BYTES (the same) or MEMORY (begin and end in the shared memory) for each part of the file, and
# END. The reply is a line of JSON.
MESSAGE = struct.Struct("<cQQ")
PATH, BYTES, MEMORY, END = b"P", b"B", b"M", b"E"


def _parts(requests: BinaryIO, memory: memoryview) -> Iterator[bytes | memoryview]:
    """Yield the contents of the messages until END.

    Raises:
        EOFError: the parent has closed the pipe, or is dead.
    """
    while True:
        header = requests.read(MESSAGE.size)
        if len(header) < MESSAGE.size:
            raise EOFError
        kind, begin, end = MESSAGE.unpack(header)
        if kind == END:
            return
        yield memory[begin:end] if kind == MEMORY else requests.read(begin)


def _write_file(parts: Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write a file, whose path is the first part. Return its SHA-256, or the number and the text of the error."""
    path = os.fsdecode(bytes(next(parts)))
    try:
        with HashingFile(path) as file:
            for part in parts:
                file.write(part)
        return {"digest": file.digest}
    except OSError as e:
        for _ in parts:  # the next request begins after them
            pass
        return {"number": e.errno, "error": e.strerror or str(e)}


def _exit_without(parent: int) -> None:
    """Wait until the process with the ID ``parent`` is dead, and exit. (The pipe may not tell: a process that it has
    forked keeps it open.)"""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def main(memory: memoryview, parent: int, requests: BinaryIO, replies: BinaryIO) -> None:
    """Write one file for each request, until the requests end or the process with the ID ``parent`` does."""
    threading.Thread(target=_exit_without, args=(parent,), daemon=True).start()
    replies.write(b"\n")
    replies.flush()
    while True:
        try:
            reply = _write_file(_parts(requests, memory))
        except EOFError:
            return
        replies.write(json.dumps(reply).encode() + b"\n")
        replies.flush()


if __name__ == "__main__":
    shared = mmap.mmap(int(sys.argv[1]), 0, access=mmap.ACCESS_READ)
    main(memoryview(shared), int(sys.argv[2]), sys.stdin.buffer, sys.stdout.buffer)
