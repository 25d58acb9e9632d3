"""The console: torchtitan's log lines, or on a terminal lines that fit it, with a live status below them."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from titanlite.environment import LAUNCH_DIR, LOG_RANK
from titanlite.errors import ConfigError
from titanlite.metrics.progress import mean_loss, plain_loss
from titanlite.metrics.sinks import Row, shown_memory
from titanlite.metrics.terminal import CLEAR, below, columns_of, fitted, is_terminal, joined, paint

# A name in a file from somebody else could move the cursor of a terminal, or write to its clipboard. Colors may pass.
_CONTROL = re.compile(r"(?!\033\[\d*m)[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_PERIOD = 0.25  # seconds between two drawings of the status
_LEVELS = {logging.WARNING: "yellow", logging.ERROR: "red", logging.CRITICAL: "red"}


class Console(logging.StreamHandler[TextIO]):
    """Logs to the console, in torchtitan's format. If its reader ends (``| head``), logging stops, and the run
    continues.

    On a terminal the prefix is left out, long lines are broken between words, and a status can be shown below them. The
    cursor rests on an empty line above the status: a line that others write stands there, and erasing from there to the
    end of the screen takes the status away, also where a narrower terminal has wrapped it. (A second line of theirs,
    before the status is drawn again, is written over it.)

    Args:
        stream: stdout.
        rank: of this process.
        shows_status: whether this process is the one that may show the status.
    """

    def __init__(self, stream: TextIO, rank: int, shows_status: bool = False) -> None:
        super().__init__(stream)
        self.on_terminal = is_terminal(stream)
        self.colored = self.on_terminal and not os.environ.get("NO_COLOR")
        self._rank = rank
        self._shows_status = shows_status and self.on_terminal
        self._status: Callable[[int], str] | None = None
        prefix = f"[rank{rank}]:[titan] %(asctime)s - %(name)s - %(levelname)s - "
        self.setFormatter(logging.Formatter("%(message)s" if self.on_terminal else f"{prefix}%(message)s"))

    @property
    def width(self) -> int:
        """The columns that a line may have."""
        return columns_of(self.stream) - 1

    @property
    def unicode(self) -> bool:
        return "utf" in (self.stream.encoding or "").lower()

    def format(self, record: logging.LogRecord) -> str:
        text = _CONTROL.sub(lambda character: repr(character[0])[1:-1], super().format(record))
        if not self.on_terminal:
            return text
        if record.levelno in _LEVELS:
            text = f"{record.levelname}: {text}"
        if self._rank and not self._shows_status:
            text = f"[rank{self._rank}] {text}"
        text = fitted(text, self.width)
        return paint(text, _LEVELS.get(record.levelno, ""), self.colored)

    def emit(self, record: logging.LogRecord) -> None:
        if not self.on_terminal:
            super().emit(record)
            return
        try:
            self._write(f"{CLEAR}{self.format(record)}\n{self._drawn()}")
        except Exception:
            self.handleError(record)

    def _drawn(self) -> str:
        return "" if self._status is None else below(self._status(self.width))

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    @contextmanager
    def live(self, status: Callable[[int], str]) -> Iterator[None]:
        """Show ``status``, a function of the number of columns, until the context ends; only on a terminal, and by one
        process."""
        if not self._shows_status or self._status is not None:
            yield
            return
        ended = threading.Event()
        thread = threading.Thread(target=self._draw_until, args=(ended,), name="status", daemon=True)
        self._status = status
        thread.start()
        try:
            yield
        finally:
            ended.set()
            with self._locked(), suppress(OSError):
                self._status = None
                self._write(CLEAR)

    def _draw_until(self, ended: threading.Event) -> None:
        while not ended.wait(_PERIOD):
            try:
                with self._locked():
                    self._write(self._drawn())
            except OSError:  # the terminal is gone
                return

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


def init_logging(rank: int, disable_color: bool = False) -> Console:
    """Log to stdout, Python's warnings too. Ranks that are not in LOG_RANK (default 0) log only warnings and errors. A
    warning that several ranks have is logged by the first of them alone.

    Returns:
        The console of this process; the lowest rank in LOG_RANK may show a status there.
    """
    chosen = os.environ.get(LOG_RANK, "0").split(",")
    if not all(part.strip().isdecimal() for part in chosen):
        raise ConfigError(f"LOG_RANK={os.environ[LOG_RANK]}: must be rank numbers separated by commas, for example 0,1")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    ranks = [*map(int, chosen)]
    if min(ranks) >= world_size:
        raise ConfigError(
            f"LOG_RANK={os.environ[LOG_RANK]}: nothing would be logged; the ranks are 0 to {world_size - 1}"
        )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    stream = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (there is no stdout after >&-)
    console = Console(stream, rank, shows_status=rank == min(ranks))
    console.colored = console.colored and not disable_color
    console.addFilter(_Once())
    root = logging.getLogger()
    root.handlers[:] = [console]
    root.setLevel(logging.INFO if rank in ranks else logging.WARNING)
    warnings.showwarning = _log_warning
    return console


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    logging.getLogger("py.warnings").warning("%s:%d: %s: %s", filename, lineno, category.__name__, message)


class _Once(logging.Filter):
    """Lets a warning pass in one of the processes that the launcher has started on this machine: the first that has
    it, which leaves a mark in the launcher's folder."""

    def __init__(self) -> None:
        super().__init__()
        self._marked: set[str] = set()  # by this process, which may repeat itself

    def filter(self, record: logging.LogRecord) -> bool:
        folder = os.environ.get(LAUNCH_DIR)
        if folder and record.levelno == logging.WARNING:
            text = f"{record.name}: {record.getMessage()}".encode("utf-8", "surrogateescape")
            mark = f"warning-{hashlib.sha256(text).hexdigest()}"
            try:
                if mark not in self._marked:
                    Path(folder, mark).touch(exist_ok=False)
            except FileExistsError:
                return False
            except OSError:  # the launcher has ended
                pass
            self._marked.add(mark)
        return True


class ConsoleSink:
    """Writes one log line for each logged step, as torchtitan does."""

    def __init__(self) -> None:
        self._logger = logging.getLogger()

    def write(self, row: Row) -> None:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.2f}%"
        fields = [
            f"step: {row['step']:2}",
            f"loss: {row['loss']:7.4f}",
            f"grad_norm: {row['grad_norm']:7.4f}",
            "memory: {:5.2f}GiB({:.2f}%)".format(*shown_memory(row)),
            f"tps: {round(row['tps']):,}",
            f"tflops: {row['tflops']:,.2f}",
            f"mfu: {mfu}",
            *_experts(row),
        ]
        self._logger.info("  ".join(fields))

    def write_validation(self, row: Row) -> None:
        self._logger.info("  ".join(_validation(row)))

    def lacks(self) -> str:
        return ""

    def close(self, failed: bool = False) -> None:
        pass


def _experts(row: Row) -> list[str]:
    if "expert_tokens" not in row:
        return []
    tokens = [count for layer in row["expert_tokens"].values() for count in layer]
    share, mean = row["expert_largest_share"], row["expert_mean_share"]
    return [
        f"experts: {min(tokens):,} to {max(tokens):,} tokens, largest {share:.1%} ({mean:.1%})",
        f"rows at a time: {row['expert_most_rows']:,}",
        f"entropy: {row['router_entropy']:.3f}",
    ]


def _validation(row: Row) -> list[str]:
    bits = "n/a" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
    return [
        f"validate step: {row['step']:2}",
        f"loss: {row['loss']:7.4f}",
        f"bits per byte: {bits}",
        *([f"accuracy: {row['accuracy']:.4f}"] if "accuracy" in row else []),
        f"({row['time_s']:.1f} s)",
    ]


class TerminalSink(ConsoleSink):
    """Writes log lines that fit a terminal, with the most important fields first.

    Colours say something: the mean loss is green if it is below that of the line before, yellow if it is above; memory
    is yellow from 85% on and red from 95%; the speed is yellow below four fifths of the best line's.

    Args:
        console: the terminal.
        losses: those of the latest steps, the last one last; somebody else adds to them.
        steps: the last step of the run.
    """

    def __init__(self, console: Console, losses: Sequence[float], steps: int) -> None:
        super().__init__()
        self._console, self._losses, self._digits = console, losses, len(f"{steps}")
        self._mean = math.inf
        self._best_tps = 0.0

    def write(self, row: Row) -> None:
        def field(text: str, style: str = "") -> str:
            return paint(text, style, self._console.colored)

        mean = mean_loss(self._losses)
        gib, percent = shown_memory(row)
        slow = row["tps"] < 0.8 * self._best_tps
        fields = [
            field(f"step {row['step']:>{self._digits}}", "bold"),
            f"loss {plain_loss(row['loss'])}",
            *([] if mean is None else [field(f"mean {plain_loss(mean)}", "green" if mean < self._mean else "yellow")]),
            f"grad_norm {row['grad_norm']:7.2f}" if row["grad_norm"] < 1e4 else f"grad_norm {row['grad_norm']:7.2g}",
            field(f"tps {round(row['tps']):,}", "yellow" if slow else ""),
            *([] if row["mfu"] is None else [f"mfu {row['mfu']:.1f}%"]),
            field(f"{gib:.1f} GiB", "red" if percent >= 95 else "yellow" if percent >= 85 else ""),
            *([] if row["tflops"] < 0.1 else [f"tflops {row['tflops']:,.1f}"]),
            *_experts(row),
        ]
        self._mean = self._mean if mean is None else mean
        self._best_tps = max(self._best_tps, row["tps"])
        self._logger.info(joined(fields, self._console.width))

    def write_validation(self, row: Row) -> None:
        first, *rest = _validation(row)
        self._logger.info(joined([paint(first, "bold", self._console.colored), *rest], self._console.width))
