"""Run an iterator ahead of its consumer, in a thread."""

from __future__ import annotations

import atexit
import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

# The interval, in seconds, at which a thread that waits for space in the queue checks the stop event.
_POLL_S = 0.05
# A thread in a network read cannot be interrupted. It is a daemon, so the process can exit without it.
_JOIN_S = 5.0


class Prefetcher(Generic[T]):
    """Keeps up to ``depth`` items of an endless iterator ready. :meth:`get` raises the exceptions of the iterator."""

    def __init__(self, items: Iterator[T], depth: int) -> None:
        self._queue: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(items,), name="titanlite-data", daemon=True)
        self._thread.start()
        # If a thread is inside PyTorch or the tokenizer while the interpreter shuts down, the process aborts.
        atexit.register(self.close)

    def get(self) -> T:
        """Wait for the next item and return it. After an error, every call raises that error again."""
        if self._error is None:
            item, self._error = self._queue.get()
        if self._error is not None:
            raise self._error
        return item  # type: ignore[return-value]  # an item without an error is a T

    def close(self) -> None:
        """Stop the thread: at once if it waits for space in the queue, else after the current item."""
        self._stop.set()
        self._thread.join(_JOIN_S)
        atexit.unregister(self.close)

    def _run(self, items: Iterator[T]) -> None:
        try:
            for item in items:
                self._put(item, None)
                if self._stop.is_set():
                    return
        except BaseException as error:  # get() raises it in the consumer's thread
            self._put(None, error)

    def _put(self, item: T | None, error: BaseException | None) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put((item, error), timeout=_POLL_S)
            except queue.Full:
                continue
