"""Files that are read from beginning to end: parquet, compressed text, compressed JSON lines."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, repeat
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, Protocol

from titanlite.data.cut import pieces
from titanlite.data.files import is_compressed, open_file
from titanlite.data.records import (
    LONGEST_RECORD,
    Corrupt,
    decode_text,
    is_blank,
    record_of_line,
    text_of_line,
    text_of_record,
)
from titanlite.data.spans import array_spans, compressed_array, element_spans, read_span

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_BUFFER = 1 << 20
_BATCH_BYTES = 1 << 24  # of a parquet file at a time, as far as its metadata tell


class Reader(Protocol):
    """A format of files.

    Attributes:
        noun: the name of a record, for messages.
        counts_all: :meth:`count` is always exact, so that its result can be kept.
    """

    noun: str
    counts_all: bool

    def count(self, file: Path, at_most: int) -> int:
        """Return the number of records of ``file``; any number from ``at_most`` on if there are more."""
        ...

    def records(self, file: Path, first: int) -> Iterator[Any]:
        """Yield the records of ``file`` from number ``first`` on."""
        ...

    def text(self, record: Any) -> str:
        """Return the text of a record; raise :class:`Corrupt` if there is none."""
        ...

    def fields(self, record: Any) -> Mapping[str, Any]:
        """Return the fields of a record as plain values; raise :class:`Corrupt` if there are none."""
        ...


class ParquetReader:
    """Parquet files. Only the columns of ``fields`` are read, those that are there, so files may differ in others.

    Args:
        fields: the columns; for :meth:`text` one, which must be there.
    """

    noun = "row"
    counts_all = True

    def __init__(self, *fields: str) -> None:
        self._fields = fields

    def count(self, file: Path, at_most: int) -> int:
        with _parquet(file) as table:
            return 0 if table is None else table.metadata.num_rows

    def records(self, file: Path, first: int) -> Iterator[Any]:
        with _parquet(file) as table:
            if table is None:
                return
            names = table.schema_arrow.names
            read = [field for field in self._fields if field in names]
            twice = [field for field in read if names.count(field) > 1]
            head = _Head(dict.fromkeys(names), read, f'two columns "{twice[0]}"' if twice else "")
            if twice or not read:
                yield from repeat((head,), table.metadata.num_rows - first)
                return
            group = 0
            while group < table.num_row_groups and (rows := table.metadata.row_group(group).num_rows) <= first:
                group, first = group + 1, first - rows
            groups = range(group, table.num_row_groups)
            for batch in table.iter_batches(_rows(table, read), groups, columns=read, use_threads=False):
                yield from zip(repeat(head), *(batch.column(field)[first:] for field in read))
                first = max(0, first - len(batch))

    def text(self, record: Any) -> str:
        field = self._fields[0]
        return text_of_record({field: _plain(record[1])} if len(record) == 2 else self.fields(record), field)

    def fields(self, record: Any) -> Mapping[str, Any]:
        """Return all columns by name; None for those that are not read."""
        head, *values = record
        if head.problem:
            raise Corrupt(head.problem, "no field")
        return {**head.columns, **dict(zip(head.read, map(_plain, values)))}


class _Head(NamedTuple):
    """The columns of a table; each of its rows begins with it.

    Attributes:
        columns: the names of all columns.
        read: those of which the values follow, in this order.
        problem: why no row can be read; "" if they can.
    """

    columns: dict[str, None]
    read: list[str]
    problem: str


def _plain(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise Corrupt(f"invalid UTF-8 ({error.reason})", "utf-8") from None


def _rows(table: ParquetFile, fields: Sequence[str]) -> int:
    """Return how many rows to read at a time: at most 64, and fewer where the columns ``fields`` have long ones."""
    data = table.metadata
    leaves = (data.schema.column(i).path for i in range(data.num_columns))
    columns = [i for i, path in enumerate(leaves) if any(f"{path}.".startswith(f"{field}.") for field in fields)]
    groups = [group for i in range(table.num_row_groups) if (group := data.row_group(i)).num_rows]
    sizes = (sum(group.column(i).total_uncompressed_size for i in columns) // group.num_rows for group in groups)
    return max(1, min(64, _BATCH_BYTES // max(1, *sizes, 1)))


@contextmanager
def _parquet(file: Path) -> Iterator[ParquetFile | None]:
    """Open a parquet file; None for a file without a byte."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    if not file.stat().st_size:
        yield None
        return
    with pyarrow.OSFile(os.fsencode(file)) as stream, ParquetFile(stream, buffer_size=_BUFFER) as table:
        yield table


class LinesReader:
    """JSON lines, or a JSON array; possibly compressed.

    Args:
        text_field: the field that holds the text, for :meth:`text`.
    """

    noun = "document"
    counts_all = False

    def __init__(self, text_field: str = "") -> None:
        self._field = text_field

    def count(self, file: Path, at_most: int) -> int:
        return sum(1 for _ in islice(self.records(file, 0), at_most))

    def records(self, file: Path, first: int) -> Iterator[bytes]:
        content = compressed_array(file) if is_compressed(file) else None
        elements = array_spans(file) if content is None and not is_compressed(file) else element_spans(content)
        if elements is not None:
            spans = ((int(begin), int(end)) for begin, end in elements[first:])
            yield from (read_span(file, *span) if content is None else content[slice(*span)] for span in spans)
            return
        with open_file(file) as stream:
            yield from islice((line for line in _lines(stream) if not is_blank(line)), first, None)

    def text(self, record: bytes) -> str:
        return text_of_line(record, self._field)

    def fields(self, record: bytes) -> Mapping[str, Any]:
        return record_of_line(record)


def _lines(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the lines; of a line that is too long, as much as shows that it is."""
    while line := stream.readline(LONGEST_RECORD + 1):
        yield line
        too_long = len(line) > LONGEST_RECORD
        while too_long and line and not line.endswith(b"\n"):
            line = stream.readline(_BUFFER)


class TextReader:
    """UTF-8 text, possibly compressed; each piece of a long file (:mod:`titanlite.data.cut`) is a record."""

    noun = "piece"
    counts_all = False

    def count(self, file: Path, at_most: int) -> int:
        return sum(1 for _ in islice(self.records(file, 0), at_most))

    def records(self, file: Path, first: int) -> Iterator[bytes]:
        with open_file(file) as stream:
            yield from islice(pieces(stream), first, None)

    def text(self, record: bytes) -> str:
        return decode_text(record)

    def fields(self, record: bytes) -> Mapping[str, Any]:
        return {"text": decode_text(record)}
