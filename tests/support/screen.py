"""What a terminal shows of a program: its real output, replayed through a terminal emulator."""

from __future__ import annotations

import fcntl
import html
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyte

from tests.support import forks

LINES = 24


class Screen:
    """A terminal of ``columns`` by 24, with all that has scrolled out of it above."""

    def __init__(self, columns: int) -> None:
        self._screen = pyte.HistoryScreen(columns, LINES, history=10_000)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""

    def feed(self, data: bytes) -> None:
        self.raw += data
        # The kernel's terminal has made "\r\n" of "\n".
        self._stream.feed(data)

    def resize(self, columns: int) -> None:
        self._screen.resize(LINES, columns)

    @property
    def cursor(self) -> tuple[int, int]:
        return self._screen.cursor.y, self._screen.cursor.x

    def visible(self) -> list[str]:
        """The lines that are seen now."""
        return [line.rstrip() for line in self._screen.display]

    def lines(self) -> list[str]:
        """All lines, without the empty ones at the end."""
        above = ["".join(row[x].data for x in range(max(row, default=-1) + 1)) for row in self._screen.history.top]
        lines = [line.rstrip() for line in (*above, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    def html(self, colors: Mapping[str, str]) -> str:
        """What is seen now, with the colours of ``colors`` by pyte's names."""
        lines = []
        for y in range(LINES):
            row = self._screen.buffer[y]
            cells = [row[x] for x in range(self._screen.columns)]
            text = "".join(
                f'<span style="color: {colors[cell.fg]}; font-weight: {700 if cell.bold else 400}">'
                f"{html.escape(cell.data)}</span>"
                for cell in cells
            )
            lines.append(text)
        return "\n".join(lines)

    def colors(self) -> set[str]:
        rows = [*self._screen.history.top, *self._screen.buffer.values()]
        return {cell.fg for row in rows for cell in row.values()} - {"default"}


def run_on_terminal(
    folder: Path,
    env: Mapping[str, str],
    columns: int,
    function: Callable[..., Any],
    *args: Any,
    seen: Callable[[Screen], int | None] = lambda screen: None,
    timeout: float = 300,
) -> tuple[int, Screen]:
    """Call ``function(*args)`` in a new process on a terminal. Returns its exit status, and the screen afterwards.

    Args:
        seen: looks at the screen after each piece of output; a number of columns that it returns is the terminal's new
            width. The process stands still for that, so that all it has written has arrived.
    """
    screen = Screen(columns)
    leader, follower = pty.openpty()
    _set_width(leader, columns)
    process = forks.start(forks.Place(env, folder, Path(os.ttyname(follower))), function, *args)
    end = time.monotonic() + timeout
    try:
        while process.exitcode is None or _ready(leader):
            assert time.monotonic() < end, "\n".join(screen.lines())
            if not _ready(leader, 0.02):
                continue
            screen.feed(os.read(leader, 1 << 16))
            width = seen(screen)
            if width is not None and process.pid is not None:
                os.kill(process.pid, signal.SIGSTOP)
                while _ready(leader, 0.1):
                    screen.feed(os.read(leader, 1 << 16))
                _set_width(leader, width)
                screen.resize(width)
                os.kill(process.pid, signal.SIGCONT)
        process.join()
    finally:
        process.kill()
        os.close(leader)
        os.close(follower)
    return process.exitcode or 0, screen


def _ready(fd: int, seconds: float = 0) -> bool:
    return bool(select.select([fd], [], [], seconds)[0])


def _set_width(fd: int, columns: int) -> None:
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
