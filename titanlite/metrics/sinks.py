"""Outputs for logged steps: what they all do, and metrics.jsonl."""

from __future__ import annotations

import json
import logging
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger()

# One logged step or one validation, with the keys of metrics.jsonl or validation.jsonl. Unknown values are None; NaN
# and infinity are possible.
Row = dict[str, Any]


class Sink(Protocol):
    def write(self, row: Row) -> None: ...
    def write_validation(self, row: Row) -> None: ...

    def lacks(self) -> str:
        """Return the rows that could not be written, and the reason; empty if all were written."""
        ...

    def close(self, failed: bool = False) -> None:
        """Close what is open.

        Args:
            failed: the run has ended with an error.
        """
        ...


def shown_memory(row: Row) -> tuple[float, float]:
    """Return the peak memory that the log line and the summary show, in GiB and in percent of the total: reserved on
    GPUs, as in torchtitan's logs; on the CPU the resident set."""
    kind = "memory" if row["reserved_gib"] is None else "reserved"
    return row[f"{kind}_gib"], row[f"{kind}_pct"]


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

    def close(self, failed: bool = False) -> None:
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
