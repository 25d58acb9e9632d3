"""Warnings that several processes of a machine log alike are shown once."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from titanlite.environment import LAUNCH_DIR

_PATIENCE = 2.0  # seconds; processes that do the same thing are not further apart, but for the first step


class Once(logging.Filter):
    """Lets a warning pass once for all processes that the launcher has started on this machine.

    A process that speaks shows its warnings at once, and leaves a mark for each in the launcher's folder. Another
    process holds a warning back for a moment, and shows it only if no process has shown the same text. Errors pass at
    once. Without the launcher, everything passes.

    Args:
        handler: shows the warnings that were held back.
        speaks: this process shows its warnings at once.
    """

    def __init__(self, handler: logging.Handler, *, speaks: bool) -> None:
        super().__init__()
        self._handler, self._speaks = handler, speaks
        self._folder = os.environ.get(LAUNCH_DIR)
        self._flushing = threading.Lock()
        self._held: deque[tuple[float, logging.LogRecord]] = deque()
        if self._folder and not speaks:
            threading.Thread(target=self._show_late, name="warnings", daemon=True).start()

    def filter(self, record: logging.LogRecord) -> bool:
        if not self._folder or record.levelno != logging.WARNING:
            return True
        if self._speaks:
            self._mark(record)
            return True
        self._held.append((time.monotonic() + _PATIENCE, record))
        return False

    def flush(self) -> None:
        """Show the warnings that are held back, unless another process has shown them."""
        with self._flushing:
            while self._held:
                due, record = self._held.popleft()
                while not self._file(record).exists() and time.monotonic() < due:
                    time.sleep(0.05)
                if self._mark(record):
                    self._handler.emit(record)

    def _show_late(self) -> None:
        while True:
            time.sleep(_PATIENCE / 4)
            self.flush()

    def _file(self, record: logging.LogRecord) -> Path:
        text = f"{record.name}: {record.getMessage()}".encode("utf-8", "surrogateescape")
        return Path(self._folder or "", f"warning-{hashlib.sha256(text).hexdigest()}")

    def _mark(self, record: logging.LogRecord) -> bool:
        """Return True if this process is the first with this warning."""
        with suppress(FileExistsError):
            with suppress(FileNotFoundError):  # the launcher has ended
                self._file(record).open("x").close()
            return True
        return False
