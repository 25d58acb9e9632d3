"""Sources with random access to local files: the standard library, text files, JSON lines."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from titanlite.data.files import find_files, require_path, unreadable
from titanlite.data.sources import SOURCES, RandomAccessSource, Source, SourceOptions
from titanlite.errors import ConfigError

# Larger files are cut into documents of this size, so that one big file gives many documents to shuffle and deal.
_DOCUMENT_BYTES = 64 * 1024

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class TextSource(RandomAccessSource):
    """UTF-8 text files; a file of over 64 KiB is cut at line ends into documents of about 64 KiB."""

    def __init__(self, options: SourceOptions, files: list[Path]) -> None:
        self._spans = [(file, begin, end) for file in files for begin, end in _cut(file)]
        super().__init__(options, len(self._spans))
        self.files = files

    def read(self, index: int) -> str | None:
        file, begin, end = self._spans[index]
        data = _read_bytes(file, begin, end)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = _lines_before(file, begin + error.start) + 1
            self.corrupt(f"{file}, line {line}", f"invalid UTF-8 ({error.reason})")
            return None


class JsonSource(RandomAccessSource):
    """JSON lines: one object per line, its text under ``text_field``; blank lines are ignored."""

    def __init__(self, options: SourceOptions, files: list[Path]) -> None:
        indexes = [_line_spans(file) for file in files]
        self._spans = np.concatenate(indexes)
        self._file_of = np.repeat(np.arange(len(files)), [len(spans) for spans in indexes])
        super().__init__(options, len(self._spans))
        self.files = files

    def read(self, index: int) -> str | None:
        file = self.files[self._file_of[index]]
        begin, end = (int(offset) for offset in self._spans[index])
        problem, text = self._parse(_read_bytes(file, begin, end))
        if problem:
            self.corrupt(f"{file}, line {_lines_before(file, begin) + 1}", problem)
        return text

    def _parse(self, line: bytes) -> tuple[str, str | None]:
        """Return (problem, None) if the line is corrupt, else ("", text)."""
        field = self.options.text_field
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return f"invalid UTF-8 ({error.reason})", None
        except ValueError as error:
            return f"not JSON ({error}); every line must be one object", None
        if not isinstance(record, dict):
            return f"a JSON {type(record).__name__}, not an object; every line must be one object", None
        if field not in record:
            return f'no field "{field}" (it has: {", ".join(record) or "none"})', None
        if not isinstance(record[field], str):
            return f'the field "{field}" is not a string', None
        try:
            record[field].encode("utf-8")
        except UnicodeEncodeError:
            return f'the field "{field}" has half of a surrogate pair, which is no character', None
        return "", record[field]


@SOURCES.register("pystdlib")
def _pystdlib(options: SourceOptions) -> Source:
    if options.path:
        raise ConfigError(
            'training.dataset = "pystdlib" reads Python\'s own library '
            'and takes no path; leave it empty, or set training.dataset = "text"',
            key="training.dataset_path",
            value=options.path,
        )
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(_library_files(root))
    if not files:
        raise ConfigError(
            f'this Python has no library source in {root}; use training.dataset = "text" with a training.dataset_path',
            key="training.dataset",
            value="pystdlib",
        )
    return TextSource(options, files)


def _library_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        # The build of Python writes _sysconfigdata*.py, which differs on every machine.
        sources = (name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata"))
        yield from (Path(folder, name) for name in sources)


@SOURCES.register("text")
def _text(options: SourceOptions) -> Source:
    path = require_path("text", options.path, "a folder of .txt files, a file, or a glob")
    return TextSource(options, find_files(path, (".txt",)))


@SOURCES.register("json")
def _json(options: SourceOptions) -> Source:
    path = require_path("json", options.path, "a folder of .json or .jsonl files, a file, or a glob")
    return JsonSource(options, find_files(path, (".json", ".jsonl")))


@SOURCES.register("c4_test")
def _c4_test(options: SourceOptions) -> Source:
    if not options.path:
        raise ConfigError(
            "is a small local sample, and training.dataset_path is empty; save some "
            'documents of c4 as JSON lines (one object with "text" per line) and set training.dataset_path to that '
            'file or folder, or use training.dataset = "pystdlib", which needs no files',
            key="training.dataset",
            value="c4_test",
        )
    return JsonSource(options, find_files(options.path, (".json", ".jsonl")))


def _cut(file: Path) -> list[tuple[int, int]]:
    """Return (begin, end) of each document in bytes; the list is empty for an empty file."""
    try:
        size = file.stat().st_size
        if size <= _DOCUMENT_BYTES:
            return [(0, size)] if size else []
        begins = [0]
        with file.open("rb") as stream:
            while begins[-1] + _DOCUMENT_BYTES < size:
                stream.seek(begins[-1] + _DOCUMENT_BYTES)
                stream.readline()
                begins.append(stream.tell())
    except OSError as error:
        raise unreadable(file, error) from error
    return [(begin, end) for begin, end in zip(begins, [*begins[1:], size]) if end > begin]


def _line_spans(file: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """Return int64 [lines, 2]: the (begin, end) bytes of each line that can hold an object (``{}`` is two bytes)."""
    ends: list[np.ndarray[tuple[int, ...], np.dtype[np.int64]]] = []
    size = 0
    try:
        with file.open("rb") as stream:
            while block := stream.read(1 << 24):
                newlines = np.frombuffer(block, dtype=np.uint8) == ord("\n")
                ends.append(np.flatnonzero(newlines).astype(np.int64) + size)
                size += len(block)
    except OSError as error:
        raise unreadable(file, error) from error
    last = np.concatenate([*ends, np.array([size], dtype=np.int64)])
    spans = np.stack([np.concatenate([[0], last[:-1] + 1]), last], axis=1)
    return spans[spans[:, 1] - spans[:, 0] >= 2]


def _read_bytes(file: Path, begin: int, end: int) -> bytes:
    try:
        with file.open("rb") as stream:
            stream.seek(begin)
            return stream.read(end - begin)
    except OSError as error:
        raise unreadable(file, error) from error


def _lines_before(file: Path, offset: int) -> int:
    return _read_bytes(file, 0, offset).count(b"\n")
