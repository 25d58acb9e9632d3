"""Sources of local text files and JSON: with random access, or streamed where a file is compressed."""

from __future__ import annotations

import os
import sysconfig
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from titanlite.data.files import JSON_SUFFIXES, find_files, is_compressed, open_file, require_path, with_compressed
from titanlite.data.index_cache import corpus_index
from titanlite.data.readers import LinesReader, Reader, TextReader
from titanlite.data.records import BYTE_ORDER_MARK, Corrupt, decode_text, record_of_line, text_of_line
from titanlite.data.sources import SOURCES, RandomAccessSource, Source, SourceOptions
from titanlite.data.spans import json_spans, line_at, piece_spans, read_span
from titanlite.data.streamed import FileStream, reading
from titanlite.errors import ConfigError

_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


class _FilesSource(RandomAccessSource):
    """Documents that are spans of files."""

    @abstractmethod
    def span(self, index: int) -> tuple[Path, int, int]:
        """Return the file of document ``index``, and its begin and end in bytes."""

    @abstractmethod
    def decode(self, data: bytes) -> Any:
        """Return the text, or the fields, of a document; raise :class:`Corrupt` if there is none."""

    def place_of(self, index: int) -> str:
        file, begin, _ = self.span(index)
        return f"{file}, line {line_at(file, begin)}"

    def read(self, index: int) -> Any:
        file, begin, end = self.span(index)
        data = read_span(file, begin, end)
        if data.startswith(BYTE_ORDER_MARK):
            self.differs_from_older(str(file), "has a byte order mark")
        try:
            return self.decode(data)
        except Corrupt as fault:
            offset = begin + fault.offset
            self.corrupt(lambda: f"{file}, line {line_at(file, offset)}", fault)
            return None

    def first_documents(self) -> Iterator[tuple[str, Corrupt | None]]:
        for index in range(self.num_documents):
            file, begin, end = self.span(index)
            problem, offset = None, 0
            try:
                self.decode(read_span(file, begin, end))
            except Corrupt as fault:
                problem, offset = fault, fault.offset
            yield f"{file}, line {line_at(file, begin + offset)}", problem


class TextSource(_FilesSource):
    """UTF-8 text files; each piece of a long file (:mod:`titanlite.data.cut`) is a document."""

    def __init__(self, options: SourceOptions, files: list[Path]) -> None:
        self._spans = [(file, begin, end) for file in files for begin, end in piece_spans(file)]
        super().__init__(options, len(self._spans), files)

    def span(self, index: int) -> tuple[Path, int, int]:
        return self._spans[index]

    def decode(self, data: bytes) -> str:
        return decode_text(data)

    def in_order(self) -> Iterator[str]:
        """Yield the text of each file, whole."""
        return whole_texts(self.files)


def whole_texts(files: Iterable[Path]) -> Iterator[str]:
    """Yield the text of each file, uncut; possibly compressed.

    Raises:
        ConfigError: a file cannot be read, or is not UTF-8.
    """
    for file in files:
        with reading(file), open_file(file) as stream:
            data = stream.read()
        try:
            yield decode_text(data)
        except Corrupt as fault:
            raise ConfigError(f"{file}, byte {fault.offset + 1}: {fault}; correct the file, or leave it out") from None


class JsonSource(_FilesSource):
    """JSON lines, or one JSON array: objects with their text under ``text_field``; blank lines are ignored."""

    def __init__(self, options: SourceOptions, files: list[Path]) -> None:
        self._index = corpus_index(files, "json", json_spans)
        super().__init__(options, len(self._index.entries), files)
        if options.fields is None:
            self.identity["text_field"] = options.text_field

    def span(self, index: int) -> tuple[Path, int, int]:
        begin, end = (int(offset) for offset in self._index.entries[index])
        return self.files[self._index.file_of(index)], begin, end

    def decode(self, data: bytes) -> Any:
        return text_of_line(data, self.options.text_field) if self.options.fields is None else record_of_line(data)


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
    files = find_files(path, with_compressed(".txt"))
    return _streamed(options, files, TextReader()) or TextSource(options, files)


@SOURCES.register("json")
def _json(options: SourceOptions) -> Source:
    path = require_path("json", options.path, f"a folder of {' or '.join(JSON_SUFFIXES)} files, a file, or a glob")
    files = find_files(path, with_compressed(*JSON_SUFFIXES))
    return _streamed(options, files, LinesReader(options.text_field)) or JsonSource(options, files)


def _streamed(options: SourceOptions, files: list[Path], reader: Reader) -> Source | None:
    """Return a source that reads the files from beginning to end, if one of them is compressed; else None."""
    return FileStream(options, files, reader) if any(map(is_compressed, files)) else None


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
    return _json(options)
