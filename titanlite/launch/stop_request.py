"""Requests to stop a run. This module does not import torch, so that signals are handled from the first moment."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from titanlite.environment import LAUNCH_DIR

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A request to stop this process: a first SIGTERM, SIGINT or SIGHUP, or the launcher's file.

    The run then ends in order after the current step. A second signal ends the process at once. A signal that was
    ignored when the process started stays ignored, as ``nohup`` needs it.
    """

    def __init__(self) -> None:
        folder = os.environ.get(LAUNCH_DIR)
        self._file = Path(folder, "stop") if folder else None
        self._signal = 0
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the launcher blocks them until here

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The launcher's file is no first request: Slurm and systemd signal the launcher and each worker once.
        if self._signal:
            if os.isatty(1):
                os.write(1, b"\r\033[J")  # the status of the run
            os._exit(128 + number)
        self._signal = number

    def requested(self) -> bool:
        return self._signal != 0 or (self._file is not None and self._file.exists())

    def close(self) -> None:
        """Restore the earlier signal handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
