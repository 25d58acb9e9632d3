"""Read the console's log of a run: titanlite's or torchtitan's, which have the same lines."""

from __future__ import annotations

import re
from collections import defaultdict
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titanlite.compare.rows import Array, Columns, in_order
from titanlite.untrusted.files import open_file

_COLOR = re.compile(rb"\x1b\[[\d;?]*[A-Za-z]")  # and what moves the cursor
_RANK = re.compile(r"\[rank\d+\]")
_TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(?:[.,]\d{3})?")
_STEP = re.compile(r"\b(validate )?step:\s*(\d+)\s+(.*)")
_FIELD = re.compile(r"(\w+):\s*([-\d.,]+(?:[eE][-+]?\d+)?|nan|inf)")
# What the lines before the first step say of the run. The first form of each is torchtitan's.
_FACTS = {
    "batch": re.compile(r"global batch size (\d+)"),
    "seq_len": re.compile(r"sequence length (\d+)|sequences? x (\d+)$"),
    "tokens": re.compile(r"^\s+tokens per step\s+([\d,]+) ="),
    "dataset": re.compile(r"Preparing (\w+) (?:validation )?dataset|^\s+data\s+(\S+)"),
    "tokenizer": re.compile(r"^\s+tokenizer\s.*sha256 (\w+)"),
    "name": re.compile(r"Starting job: (.+)"),
}
_COLUMNS = {"loss": "loss", "grad_norm": "grad_norm", "tps": "tps", "mfu": "mfu", "memory": "reserved_gib"}
_LONGEST_LINE = 1 << 16  # bytes


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


def read_console_log(file: Path) -> ConsoleLog:
    """Read the lines of the first rank in the log. A log of several runs, one after the other, is read as one that was
    continued.

    Raises:
        OSError: it cannot be read.
    """
    steps: dict[bool, list[dict[str, float]]] = {False: [], True: []}
    starts: set[int] = set()  # the places in the first of these lists where a run was continued
    said: dict[str, str] = {}
    first_rank = None
    with open_file(file) as lines:
        while raw := lines.readline(_LONGEST_LINE):
            line = _COLOR.sub(b"", raw).decode("utf-8", "replace").rstrip()
            if match := _STEP.search(line):
                rank = (_RANK.search(line) or [""])[0]
                first_rank = rank if first_rank is None else first_rank
                if rank == first_rank:
                    steps[bool(match[1])].append(_row(line, int(match[2]), match[3]))
            else:
                for name, pattern in _FACTS.items():
                    if fact := pattern.search(line):
                        said.setdefault(name, next(filter(None, fact.groups())))
                        starts.add(len(steps[False]))
    metrics, validation = _table(steps[False], starts), _table(steps[True], set())
    facts = _facts(said)
    if "tokens per step" in facts:
        metrics["tokens_seen"] = metrics["step"] * facts["tokens per step"]
    return ConsoleLog(metrics, validation, facts, said.get("name", ""))


def _row(line: str, step: int, fields: str) -> dict[str, float]:
    row = {"step": float(step)}
    for name, number in _FIELD.findall(fields):
        if name in _COLUMNS:
            row[_COLUMNS[name]] = _float(number)
    if time := _TIME.search(line):
        row["hours"] = datetime.fromisoformat(time[0].replace(",", ".")).timestamp() / 3600
    return row


def _float(text: str) -> float:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return np.nan


def _table(rows: list[dict[str, float]], starts: set[int]) -> Columns:
    """Return the rows as columns. The time before those where a run was continued is left out: it trained nothing."""
    columns: defaultdict[str, Array] = defaultdict(lambda: np.full(len(rows), np.nan))
    for name in ("step", "hours", *_COLUMNS.values()):
        columns[name][:] = [row.get(name, np.nan) for row in rows]
    step, hours = columns["step"], columns["hours"]
    between = np.nan_to_num(np.diff(hours, prepend=hours[:1]))
    begins = np.isin(np.arange(len(rows)), [*starts]) | (np.diff(step, prepend=-np.inf) <= 0)
    columns["hours"] = np.where(np.isfinite(hours), np.cumsum(np.where(begins, 0.0, between)), np.nan)
    return in_order(columns)


def _facts(said: dict[str, str]) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if "dataset" in said:
        facts["training.dataset"] = said["dataset"]
    if "seq_len" in said:
        facts["training.seq_len"] = int(said["seq_len"])
    if "tokens" in said:
        facts["tokens per step"] = int(said["tokens"].replace(",", ""))
    elif "batch" in said and "seq_len" in said:
        facts["tokens per step"] = int(said["batch"]) * int(said["seq_len"])
    if "tokenizer" in said:
        facts["tokenizer"] = said["tokenizer"]
    return facts
