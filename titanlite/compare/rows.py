"""Read ``metrics.jsonl`` and ``validation.jsonl`` into columns."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titanlite.untrusted import files

Array = NDArray[np.float64]
Columns = dict[str, Array]  # by name, (rows,) each; NaN where a value is unknown

_MOST_BYTES = 1 << 32
_LONGEST_ROW = 1 << 20  # bytes; a longer line is no row
_READ_AT_ONCE = 1 << 22  # bytes
_READ_BY_LINE = 1 << 14  # bytes


def read_columns(file: Path, names: Iterable[str]) -> Columns:
    """Return the numbers ``names`` of the rows in a file of JSON lines, by ascending ``step``, one row for each step.
    Lines that are no rows, such as one that is being written, are left out.

    Raises:
        OSError: it cannot be read.
        ConfigError: it has more than 4 GiB.
    """
    text = files.read_bytes(file, _MOST_BYTES)
    wanted = ["step", *names]
    # The line that is being written at the end would send half of the file to the parser again, then a quarter, ...
    end_of_rows = text.rfind(b"\n") + 1
    parts = [*_parts(text[:end_of_rows], wanted), _parsed_by_line(text[end_of_rows:], wanted)]
    return in_order({name: np.concatenate([part[name] for part in parts]) for name in wanted})


def _parts(text: bytes, names: list[str]) -> list[Columns]:
    """Return the columns of ``text`` in parts. Only a small part around a line that is no row is read by Python."""
    if (parsed := _parsed(text, names)) is not None:
        return [parsed]
    half = len(text) // 2
    middle = text.find(b"\n", half) + 1
    middle = middle if 0 < middle < len(text) else text.rfind(b"\n", 0, half) + 1
    if len(text) <= _READ_BY_LINE or not 0 < middle < len(text):
        return [_parsed_by_line(text, names)]
    return _parts(text[:middle], names) + _parts(text[middle:], names)


def _parsed(text: bytes, names: list[str]) -> Columns | None:
    """Return the columns by pyarrow's parser, a hundred times as fast as Python's; None if a line is no row."""
    import pyarrow
    from pyarrow import json as arrow_json

    schema = pyarrow.schema([(name, pyarrow.float64()) for name in names])
    parse = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = arrow_json.ReadOptions(block_size=_READ_AT_ONCE)
    try:
        table = arrow_json.read_json(pyarrow.BufferReader(text), read_options=read, parse_options=parse)
    except pyarrow.ArrowInvalid:
        return None
    return {name: table[name].to_numpy().astype(np.float64) for name in names}


def _parsed_by_line(text: bytes, names: list[str]) -> Columns:
    rows = []
    lines = io.BytesIO(text)
    while line := lines.readline(_LONGEST_ROW):
        try:
            row = json.loads(line)
            rows.append([_number(row.get(name)) for name in names])
        except (ValueError, AttributeError, RecursionError):
            continue
    table = np.array(rows, dtype=np.float64).reshape(len(rows), len(names))
    return {name: table[:, column] for column, name in enumerate(names)}


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else np.nan
    except OverflowError:
        return np.nan


def in_order(columns: Mapping[str, Array]) -> Columns:
    """Return the rows by ascending ``step``, without those that have none. Of a step that stands there several times,
    as in the log of a run that was continued, the last row counts."""
    step = columns["step"]
    rows = np.flatnonzero(np.isfinite(step))[::-1]
    _, first = np.unique(step[rows], return_index=True)
    return {name: column[rows[first]] for name, column in columns.items()}
