"""Files that are read from beginning to end, once for all shards of a process that read the same one."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

KEPT_BYTES = 16 << 20  # of the records behind the one that is furthest ahead
_STRIPES_BEFORE = 4  # a shard that continues begins so many rounds of all shards earlier, so that others can join it


class SharedRecords:
    """The records of several files, each decoded once as long as the shards that read it stay close together.

    A shard that asks for a record opens a window on the file, and reads on in it. The window keeps the latest records,
    at most :data:`KEPT_BYTES` of them, for the other shards. One that falls behind it, or begins the next epoch, opens
    another window, which others join in turn. A window is gone when no shard reads in it. Any thread may ask.

    Args:
        read: yields the records of a file (its number) from a row on.
    """

    def __init__(self, read: Callable[[int, int], Iterator[Any]]) -> None:
        self._read = read
        self._windows: dict[int, weakref.WeakSet[_Window]] = {}
        self._lock = threading.Lock()

    def every(self, file: int, first: int, member: int, members: int) -> Iterator[tuple[int, Any]]:
        """Yield the number and the record of each row from ``first`` on that is the one of ``member``: rows are dealt
        to ``members`` in turn."""
        row = first + (member - first) % members
        window = None
        while True:
            if window is None or row < window.begin:
                window = self._window(file, row, members)
            try:
                record = window.record(row)
            except _Passed:
                continue
            except _End:
                return
            yield row, record
            row += members

    def _window(self, file: int, row: int, members: int) -> _Window:
        """Return a window that has ``row``, or is shortly before it; else a new one."""
        with self._lock:
            windows = self._windows.setdefault(file, weakref.WeakSet())
            near = [w for w in windows if w.begin <= row <= w.end + _STRIPES_BEFORE * members]
            if near:
                return min(near, key=lambda window: abs(window.end - row))
            begin = max(0, row - _STRIPES_BEFORE * members)
            window = _Window(self._read(file, begin), begin)
            windows.add(window)
            return window


class _Passed(Exception):
    """The window no longer has the row."""


class _End(Exception):
    """The file has no such row."""


class _Window:
    """The latest records of one pass through a file: rows ``begin`` to ``end``, which is the next to be read."""

    def __init__(self, records: Iterator[Any], begin: int) -> None:
        self.begin = self.end = begin
        self._records, self._kept, self._bytes = records, deque[tuple[Any, int]](), 0
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def record(self, row: int) -> Any:
        with self._lock:
            while self.end <= row:
                self._advance()
            if row < self.begin:
                raise _Passed
            return self._kept[row - self.begin][0]

    def _advance(self) -> None:
        if self._failure is not None:  # the shards after the first must not take a failure for the end of the file
            raise self._failure
        try:
            record = next(self._records)
        except StopIteration:
            self._failure = _End()
            raise self._failure from None
        except BaseException as e:
            self._failure = e
            raise
        size = _size(record)
        self._kept.append((record, size))
        self._bytes += size
        self.end += 1
        while self._bytes > KEPT_BYTES and len(self._kept) > 1:
            self._bytes -= self._kept.popleft()[1]
            self.begin += 1


def _size(record: Any) -> int:
    """Return about how many bytes a record takes."""
    if isinstance(record, (str, bytes)):
        return 64 + len(record)
    if isinstance(record, dict):
        return 64 + sum(map(_size, record.values()))
    if isinstance(record, (list, tuple)):
        return 64 + sum(map(_size, record))
    return 64
