"""Outputs for logged steps: the console and metrics.jsonl."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import re
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from titanlite.environment import LAUNCH_DIR, LOG_RANK
from titanlite.errors import ConfigError

logger = logging.getLogger()

# One logged step or one validation, with the keys of metrics.jsonl or validation.jsonl. Unknown values are None; NaN
# and infinity are possible.
Row = dict[str, Any]

_COLORS = {"red": 31, "green": 32, "orange": 33, "blue": 34, "magenta": 35, "cyan": 36}


class Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def write_validation(self, row: Row) -> None: ...

    def lacks(self) -> str:
        """Return the rows that could not be written, and the reason; empty if all were written."""
        ...

    def close(self) -> None: ...


def init_logging(rank: int) -> None:
    """Log to stdout in torchtitan's format, Python's warnings too. Ranks that are not in LOG_RANK (default 0) log only
    warnings and errors. A warning that several ranks have is logged by the first of them alone."""
    chosen = os.environ.get(LOG_RANK, "0").split(",")
    if not all(part.strip().isdecimal() for part in chosen):
        raise ConfigError(f"LOG_RANK={os.environ[LOG_RANK]}: must be rank numbers separated by commas, for example 0,1")
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if min(map(int, chosen)) >= world_size:
        raise ConfigError(
            f"LOG_RANK={os.environ[LOG_RANK]}: nothing would be logged; the ranks are 0 to {world_size - 1}"
        )
    speaks = rank in map(int, chosen)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files can be any bytes
    handler = _ConsoleHandler(sys.stdout or open(os.devnull, "w"))  # noqa: SIM115  (there is no stdout after >&-)
    handler.addFilter(_Once())
    handler.setFormatter(
        logging.Formatter(f"[rank{rank}]:[titan] %(asctime)s - %(name)s - %(levelname)s - %(message)s")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if speaks else logging.WARNING)
    warnings.showwarning = _log_warning


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


# A name in a file from somebody else could move the cursor of a terminal, or write to its clipboard. Colors may pass.
_CONTROL = re.compile(r"(?!\033\[\d*m)[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class _ConsoleHandler(logging.StreamHandler[TextIO]):
    """Logs to the console. If its reader ends (``| head``), logging stops, and the run continues."""

    def format(self, record: logging.LogRecord) -> str:
        return _CONTROL.sub(lambda character: repr(character[0])[1:-1], super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        else:
            super().handleError(record)


def is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def shown_memory(row: Row) -> tuple[float, float]:
    """Return the peak memory that the log line and the summary show, in GiB and in percent of the total: reserved on
    GPUs, as in torchtitan's logs; on the CPU the resident set."""
    kind = "memory" if row["reserved_gib"] is None else "reserved"
    return row[f"{kind}_gib"], row[f"{kind}_pct"]


def _duration(seconds: float) -> str:
    minutes, hours = int(seconds / 60), int(seconds / 3600)
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{int(seconds) % 60:02}s"


class ConsoleSink:
    """Writes one log line for each step.

    Args:
        colored: color the fields.
        steps: the last step, to show progress and remaining time on an interactive terminal; None hides them.
    """

    def __init__(self, colored: bool, steps: int | None) -> None:
        self._codes = _COLORS if colored else {}
        self._steps = steps
        self._logger = logging.getLogger()

    def _paint(self, color: str, text: str) -> str:
        return f"\033[{self._codes[color]}m{text}\033[0m" if color in self._codes else text

    def write(self, row: Row) -> None:
        mfu = "n/a" if row["mfu"] is None else f"{row['mfu']:.2f}%"
        fields = [
            self._paint("red", f"step: {row['step']:2}"),
            self._paint("green", f"loss: {row['loss']:7.4f}"),
            self._paint("orange", f"grad_norm: {row['grad_norm']:7.4f}"),
            self._paint("blue", "memory: {:5.2f}GiB({:.2f}%)".format(*shown_memory(row))),
            self._paint("cyan", f"tps: {round(row['tps']):,}"),
            self._paint("magenta", f"tflops: {row['tflops']:,.2f}"),
            self._paint("magenta", f"mfu: {mfu}"),
        ]
        if "expert_tokens" in row:
            tokens = [count for layer in row["expert_tokens"].values() for count in layer]
            share, mean = row["expert_largest_share"], row["expert_mean_share"]
            fields += [
                self._paint(
                    "blue", f"experts: {min(tokens):,} to {max(tokens):,} tokens, largest {share:.1%} ({mean:.1%})"
                ),
                self._paint("blue", f"entropy: {row['router_entropy']:.3f}"),
            ]
        if self._steps is not None:
            remaining = _duration((self._steps - row["step"]) * row["step_time_s"])
            fields.append(f"{row['step'] / self._steps:.0%}, {remaining} left")
        self._logger.info("  ".join(fields))

    def write_validation(self, row: Row) -> None:
        bits = "n/a" if row["bits_per_byte"] is None else f"{row['bits_per_byte']:.4f}"
        fields = [
            self._paint("red", f"validate step: {row['step']:2}"),
            self._paint("green", f"loss: {row['loss']:7.4f}"),
            self._paint("orange", f"bits per byte: {bits}"),
            *([self._paint("blue", f"accuracy: {row['accuracy']:.4f}")] if "accuracy" in row else []),
            f"({row['time_s']:.1f} s)",
        ]
        self._logger.info("  ".join(fields))

    def lacks(self) -> str:
        return ""

    def close(self) -> None:
        pass


class JsonlSink:
    """Writes metrics.jsonl: one JSON object per line, without buffering, so that a killed run keeps its rows. Values
    that are not finite are null, because JSON does not have them.

    Args:
        validation: the path of validation.jsonl; None without validation.
    """

    def __init__(self, path: Path, validation: Path | None = None) -> None:
        self._file = _LinesFile(path)
        self._validation = _LinesFile(validation) if validation else None

    def write(self, row: Row) -> None:
        self._file.write(row)

    def write_validation(self, row: Row) -> None:
        assert self._validation is not None
        self._validation.write(row)

    def lacks(self) -> str:
        return "; ".join(filter(None, (file.lacks() for file in (self._file, self._validation) if file)))

    def close(self) -> None:
        for file in (self._file, self._validation):
            if file is not None:
                file.close()


class _LinesFile:
    """A file of JSON lines. Lines that cannot be written (a full disk) stay in memory and are written before the next
    line, so that a long run does not end because of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._kept = b""
        self._error = ""

    def write(self, row: Row) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._kept += json.dumps(finite, allow_nan=False).encode() + b"\n"
        try:
            while self._kept:
                self._kept = self._kept[self._file.write(self._kept) :]
        except OSError as e:
            if not self._error:
                logger.error("%s CANNOT BE WRITTEN: %s. Its rows are kept until it can be", self._path, e)
            self._error = str(e)
        else:
            if self._error:
                logger.warning("%s can be written again, and has all rows", self._path)
            self._error = ""

    def lacks(self) -> str:
        return f"{self._path} lacks its last rows ({self._error})" if self._kept else ""

    def close(self) -> None:
        """Close the file. It is removed if it has no line, as when a run ends with an error in its first step."""
        self._file.close()
        with suppress(OSError):
            if not self._path.stat().st_size:
                self._path.unlink()
