"""Run an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# How often a thread that waits for room looks whether it was told to end.
_POLL_S = 0.05
# A thread inside a network read cannot be interrupted; it is a daemon, so that leaving it behind is harmless.
_JOIN_S = 5.0


class Prefetcher(Generic[T]):
    """Keeps up to ``depth`` items of an endless iterator ready; what the iterator raises, :meth:`get` raises."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(items,), name="titanlite-data", daemon=True)
        self._thread.start()
        # A thread still inside PyTorch or the tokenizer while the interpreter goes away aborts the process.
        atexit.register(self.close)

    def get(self) -> T:
        """The next item; waits for it. After an error every call raises it again."""
        if self._error is None:
            item, self._error = self._queue.get()
        if self._error is not None:
            raise self._error
        return item  # type: ignore[return-value]  # an item without an error is a T

    def close(self) -> None:
        """End the thread: at once where it waits for room, else after the item it is at."""
        self._stop.set()
        self._thread.join(_JOIN_S)
        atexit.unregister(self.close)

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item, None)
                if self._stop.is_set():
                    return
        except BaseException as error:  # it belongs to the consumer's thread, whatever it is
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put((item, error), timeout=_POLL_S)
            except queue.Full:
                continue
