"""Read the console's log of a run: titanlite's or torchtitan's, which have the same lines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titanlite.compare.rows import Array, Columns, in_order
from titanlite.errors import ConfigError
from titanlite.untrusted.files import open_file

_COLOR = re.compile(rb"\x1b\[[\d;?]*[A-Za-z]")  # and what moves the cursor
_RANK = re.compile(r"\[rank\d+\]")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d{3})?")
_STEP = re.compile(r"\b(validate )?step:\s*(\d+)\s+(.*)")
_FIELD = re.compile(r"(\w+):\s*([-\d.,]+(?:[eE][-+]?\d+)?|nan|inf)")
# What the lines before the first step say of the run: in torchtitan's words of 2025, of 2026, and in titanlite's.
_FACTS = {
    "batch": re.compile(r"global batch size (\d+)"),
    "seq_len": re.compile(r"sequence length (\d+)|maximum context length (\d+)|sequences? x (\d+)$"),
    "tokens": re.compile(r"\b([\d,]+) tokens per train step|^\s+tokens per step\s+([\d,]+) ="),
    "dataset": re.compile(r"Preparing (\w+) (?:validation )?dataset|^\s+data\s+(\S+)"),
    "path": re.compile(r"^\s+data\s+\S+ \((.+)\)$"),
    "tokenizer": re.compile(r"^\s+tokenizer\s.*sha256 (\w+)"),
    "name": re.compile(r"Starting job: (.+)"),
}
_COLUMNS = {"loss": "loss", "grad_norm": "grad_norm", "tps": "tps", "mfu": "mfu", "memory": "reserved_gib"}
_LONGEST_LINE = 1 << 16  # bytes


Rows = list[dict[str, float]]


class ConsoleLog(NamedTuple):
    """Attributes:
    metrics, validation: the rows of the logged steps, with the names of metrics.jsonl, and ``hours``.
    facts: what the log says of the data, by the names of ``titanlite.compare.alike``; only what it says.
    name: the name of the job, if the log has it.
    """

    metrics: Columns
    validation: Columns
    facts: dict[str, Any]
    name: str


class _RowsOfOneRank:
    """The rows of the first rank that has losses. Those of other ranks are dropped as they come: a log can have
    hundreds of ranks. Stages of a pipeline other than the last log -1 as their loss.

    Attributes:
        rank: the name of that rank in the log; None before its first row.
        ranks_without_loss: the names of the ranks that logged a step without a loss.
        steps: its rows of steps, in the order of the log.
    """

    def __init__(self) -> None:
        self.rank: str | None = None
        self.ranks_without_loss: dict[str, None] = {}  # in the order of the log
        self.steps: Rows = []
        self._validations: dict[str, Rows] = {}  # by rank: a validation can come before the first step

    def add(self, rank: str, row: dict[str, float], *, is_validation: bool) -> None:
        if self.rank not in (None, rank):
            return
        if is_validation:
            self._validations.setdefault(rank, []).append(row)
        elif row.get("loss", np.nan) < 0:
            self.ranks_without_loss[rank] = None
        else:
            if self.rank is None:
                self.rank = rank
                self._validations = {rank: self._validations.get(rank, [])}
            self.steps.append(row)

    def validations(self) -> Rows:
        """Return its rows of validations; those of all ranks if none has logged a step."""
        return [row for rows in self._validations.values() for row in rows]


def read_console_log(file: Path) -> ConsoleLog:
    """Read the lines of the first rank in the log that has losses. A log of several runs, one after the other, is read
    as one that was continued.

    Raises:
        OSError: it cannot be read.
        ConfigError: the ranks in it have no loss.
    """
    rows = _RowsOfOneRank()
    starts: list[int] = []  # the lines that a run begins with
    said: dict[str, str] = {}
    with open_file(file) as lines:
        for number, raw in enumerate(iter(lambda: lines.readline(_LONGEST_LINE), b"")):
            line = _COLOR.sub(b"", raw).decode("utf-8", "replace").rstrip()
            if match := _STEP.search(line):
                row = _row(line, int(match[2]), match[3]) | {"line": number}
                rows.add((_RANK.search(line) or [""])[0], row, is_validation=bool(match[1]))
            else:
                for name, pattern in _FACTS.items():
                    if fact := pattern.search(line):
                        said.setdefault(name, next(filter(None, fact.groups())))
                        starts.append(number)
    if rows.ranks_without_loss and rows.rank is None:
        names = ", ".join(name.strip("[]") for name in rows.ranks_without_loss if name) or "the rank"
        raise ConfigError(
            f"{file}: {names} in it has no loss, as a stage of a pipeline before the last has none (loss: -1); "
            "log a rank of the last stage (LOG_RANK=..., as run_train.sh takes it), and name that log"
        )
    metrics, validation = _table(rows.steps, starts), _table(rows.validations(), starts)
    facts = _facts(said)
    if "tokens per step" in facts:
        metrics["tokens_seen"] = metrics["step"] * facts["tokens per step"]
    return ConsoleLog(metrics, validation, facts, said.get("name", ""))


def _row(line: str, step: int, fields: str) -> dict[str, float]:
    row = {"step": float(step)}
    for name, number in _FIELD.findall(fields):
        if name in _COLUMNS:
            row.setdefault(_COLUMNS[name], _float(number))  # a line of another rank can follow without a line break
    if time := _TIME.search(line):
        row["hours"] = datetime.fromisoformat(time[0].replace(",", ".")).timestamp() / 3600
    return row


def _float(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return np.nan


def _table(rows: Rows, starts: Sequence[int]) -> Columns:
    """Return the rows as columns. The time before those where a run was continued is left out: it trained nothing.

    Args:
        starts: the lines that a run begins with, ascending.
    """
    columns: defaultdict[str, Array] = defaultdict(lambda: np.full(len(rows), np.nan))
    for name in ("step", "hours", *_COLUMNS.values()):
        columns[name][:] = [row.get(name, np.nan) for row in rows]
    step, hours = columns["step"], columns["hours"]
    between = np.nan_to_num(np.diff(hours, prepend=hours[:1]))
    run = np.searchsorted(starts, [row["line"] for row in rows])
    begins = (np.diff(run, prepend=-1) != 0) | (np.diff(step, prepend=-np.inf) <= 0)
    columns["hours"] = np.where(np.isfinite(hours), np.cumsum(np.where(begins, 0.0, between)), np.nan)
    return in_order(columns)


def _facts(said: dict[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "dataset" in said:
        facts["training.dataset"] = said["dataset"]
    if "path" in said:
        facts["training.dataset_path"] = said["path"]
    if "seq_len" in said:
        facts["training.seq_len"] = int(said["seq_len"])
    if "tokens" in said:
        facts["tokens per step"] = int(said["tokens"].replace(",", ""))
    elif "batch" in said and "seq_len" in said:
        facts["tokens per step"] = int(said["batch"]) * int(said["seq_len"])
    if "tokenizer" in said:
        facts["tokenizer"] = said["tokenizer"]
    return facts
