"""Sources that are read from beginning to end: local parquet and compressed files, and data sets of the Hugging Face
hub."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from titanlite.config.run_config import HUB
from titanlite.data.files import JSON_SUFFIXES, find_files, require_path, unreadable, with_compressed
from titanlite.data.index_cache import corpus_index
from titanlite.data.readers import LinesReader, ParquetReader, Reader, TextReader
from titanlite.data.records import Corrupt, text_of_record
from titanlite.data.shared_records import SharedRecords
from titanlite.data.sources import (
    HUB_FORM,
    MIN_DOCUMENTS,
    SOURCES,
    Position,
    Source,
    SourceOptions,
    permutation,
    require_documents,
)
from titanlite.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 10.0


class StreamedSource(Source):
    """A source that reads files from beginning to end. The files are shuffled with the seed and dealt to the shards.

    With V shards, F files and V <= F, shard i reads the shuffled files i, i + V, i + 2V, ... With V > F, several shards
    read the same file, and each keeps a part of its documents and skips the rest. Those of one process decode it once
    (:mod:`titanlite.data.shared_records`), those of others once more. So streaming is fastest if there are at least as
    many files as sequences in the global batch. The order in a file is kept. Shards of different sizes
    start their next epochs at different times. A resumed run reads the current file again up to its position, but not
    the files before it.
    """

    def __init__(self, options: SourceOptions, num_files: int, files: Sequence[Path] = ()) -> None:
        super().__init__(options, files)
        self._num_parts = num_files
        self.identity["files"] = num_files
        self._order = permutation(num_files, options.seed).tolist()
        self._shared = SharedRecords(self.records)

    @abstractmethod
    def records(self, file: int, first: int) -> Iterator[Any]:
        """Yield the records of a file from number ``first`` on."""

    @abstractmethod
    def text_of(self, record: Any) -> Any:
        """Return the text, or the fields, of a record; raise :class:`Corrupt` if there is none."""

    @abstractmethod
    def record_location(self, file: int, row: int) -> str:
        """Return the place of a record, for messages."""

    def location(self, shard: int, num_shards: int, epoch: int, position: Position) -> str:
        return self.record_location(self._order[position.part], position.document)

    def in_order(self) -> Iterator[str]:
        for file in range(self._num_parts):
            for row, record in enumerate(self.records(file, 0)):
                if (text := self._text(file, row, record)) is not None:
                    yield text

    def _text(self, file: int, row: int, record: Any) -> str | None:
        """Return the text of a record; if it is corrupt, report it with :meth:`corrupt` and return None."""
        try:
            return self.text_of(record)
        except Corrupt as fault:
            self.corrupt(partial(self.record_location, file, row), fault)
            return None

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        groups = min(num_shards, self._num_parts)
        group, member = shard % groups, shard // groups
        members = len(range(group, num_shards, groups))
        for part in range(group, self._num_parts, groups):
            if part < start.part:
                continue
            first = start.document if part == start.part else 0
            file = self._order[part]
            rows: Iterator[tuple[int, Any]] = enumerate(self.records(file, first), start=first)
            if members > 1:
                rows = self._shared.every(file, first, member, members)
            for row, record in rows:
                if (text := self._text(file, row, record)) is not None:
                    yield Position(part, row), text


class FileStream(StreamedSource):
    """Local files in the format of ``reader``. Files without documents are left out."""

    def __init__(self, options: SourceOptions, files: list[Path], reader: Reader) -> None:
        self._reader = reader
        self._known: dict[Path, int] = {}
        if reader.counts_all:
            index = corpus_index(files, "rows", lambda file: np.array([[self._count(file, 0)]], dtype=np.int64))
            self._known = dict(zip(files, index.entries[:, 0].tolist(), strict=True))
        self._full = [file for file in files if self._count(file, 1)]
        require_documents(len(self._full), options)
        super().__init__(options, len(self._full), files)
        if options.fields is None and not isinstance(reader, TextReader):  # which has no fields
            self.identity["text_field"] = options.text_field

    def num_shards(self, at_most: int) -> int:
        """Return the largest divisor of ``at_most`` with at least 16 documents in every shard, or else 1."""
        enough = MIN_DOCUMENTS * -(-at_most // self._num_parts)
        sizes = [self._count(self._full[file], enough) for file in self._order]
        divisors = (number for number in range(at_most, 1, -1) if at_most % number == 0)
        return next((n for n in divisors if min(_documents_per_shard(sizes, n)) >= MIN_DOCUMENTS), 1)

    def records(self, file: int, first: int) -> Iterator[Any]:
        with reading(self._full[file]):
            yield from self._reader.records(self._full[file], first)

    def text_of(self, record: Any) -> Any:
        return self._reader.text(record) if self.options.fields is None else self._reader.fields(record)

    def record_location(self, file: int, row: int) -> str:
        return f"{self._full[file]}, {self._reader.noun} {row + 1}"

    def first_documents(self) -> Iterator[tuple[str, Corrupt | None]]:
        for file in range(self._num_parts):
            for row, record in enumerate(self.records(file, 0)):
                problem = None
                try:
                    self.text_of(record)
                except Corrupt as fault:
                    problem = fault
                yield self.record_location(file, row), problem

    def _count(self, file: Path, at_most: int) -> int:
        if file in self._known:
            return self._known[file]
        with reading(file):
            return self._reader.count(file, at_most)


def _documents_per_shard(sizes: list[int], num_shards: int) -> list[int]:
    """Return the number of documents in each shard, given those in each file, in the order of the files."""
    groups = min(num_shards, len(sizes))
    members = [len(range(group, num_shards, groups)) for group in range(groups)]
    return [sum(size // members[group] for size in sizes[group::groups]) for group in range(groups)]


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what a reader of ``file`` raises into ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # any exception of the reader of the format
        if isinstance(error, OSError) and error.errno is not None:
            raise unreadable(file, error) from error
        raise ConfigError(
            f"{file}: reading failed ({_named(error)}); replace the file or leave it out of training.dataset_path"
        ) from error


class HubStream(StreamedSource):
    """A data set of the Hugging Face hub."""

    def __init__(self, options: SourceOptions, stream: IterableDataset) -> None:
        super().__init__(options, int(stream.num_shards))
        if options.fields is None:
            self.identity["text_field"] = options.text_field
        self._stream = stream

    def num_shards(self, at_most: int) -> int:
        """Return ``at_most``, because the number of documents in the stream is unknown."""
        return at_most

    def records(self, file: int, first: int) -> Iterator[Any]:
        try:
            yield from self._stream.shard(num_shards=self._num_parts, index=file).skip(first)
        except Exception as error:  # any exception of the reader of the format, or of the network
            raise TrainingError(
                f"{self.options.name}, file {file} of {self._num_parts}: reading failed ({_named(error)}); start the "
                "run again to continue from its last checkpoint, or use a local copy through training.dataset_path"
            ) from error

    def text_of(self, record: Any) -> Any:
        return text_of_record(record, self.options.text_field) if self.options.fields is None else record

    def record_location(self, file: int, row: int) -> str:
        return f"{self.options.name}, file {file} of {self._num_parts}, row {row + 1}"


@SOURCES.register("parquet")
def _parquet(options: SourceOptions) -> Source:
    path = require_path("parquet", options.path, "a folder of .parquet files, a file, or a glob")
    return FileStream(options, find_files(path, (".parquet",)), ParquetReader(options.text_field))


@SOURCES.register("c4")
def _c4(options: SourceOptions) -> Source:
    return _hub_or_copy(options, "allenai/c4", "en")


@SOURCES.register("fineweb_edu")
def _fineweb_edu(options: SourceOptions) -> Source:
    return _hub_or_copy(options, "HuggingFaceFW/fineweb-edu", "sample-10BT")


@SOURCES.register(HUB_FORM)
def _hub(options: SourceOptions) -> Source:
    return _hub_or_copy(options, *hub_address(options.name, "training.dataset"))


def hub_address(address: str, key: str) -> tuple[str, str | None]:
    """Return the repository and the subset, if it names one, of ``hub:owner/name:subset``.

    Args:
        key: the option that has the address, for the message.

    Raises:
        ConfigError: it has another form.
    """
    match = re.fullmatch(rf"{HUB}([\w.-]+/[\w.-]+)(?::([\w.-]+))?", address)
    if match is None:
        raise ConfigError(f"has not the form {HUB_FORM} or {HUB_FORM}:subset", key=key, value=address)
    return match[1], match[2]


def _hub_or_copy(options: SourceOptions, repo: str, subset: str | None) -> Source:
    if not options.path:
        return HubStream(options, open_hub(options.name, repo, subset))
    json = with_compressed(*JSON_SUFFIXES)
    files = find_files(options.path, (".parquet", *json))
    fields = (options.text_field,) if options.fields is None else options.fields
    readers: dict[str, Reader] = {"parquet": ParquetReader(*fields), "JSON": LinesReader(options.text_field)}
    suffixes = {".parquet": "parquet", **dict.fromkeys(json, "JSON")}
    formats = {name for file in files for suffix, name in suffixes.items() if file.name.lower().endswith(suffix)}
    if len(formats) != 1:
        raise ConfigError(
            f"a local copy of {repo} must be either parquet or JSON lines, not "
            f"{' and '.join(sorted(formats)) or 'other files'}; narrow it with a glob",
            key="training.dataset_path",
            value=options.path,
        )
    return FileStream(options, files, readers[formats.pop()])


def open_hub(name: str, repo: str, subset: str | None) -> IterableDataset:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    logger.info(f"{name}: streaming {repo} ({subset or 'default'}) from the Hugging Face hub")
    try:
        # A request with a timeout first: without a network, load_dataset alone retries for 20 seconds or more.
        HfApi().dataset_info(repo, timeout=_PROBE_TIMEOUT_S)
        return load_dataset(repo, subset, split="train", streaming=True)
    except Exception as error:  # exceptions of the hub library and of its HTTP library
        raise ConfigError(
            f"{repo} cannot be read from the Hugging Face hub "
            f"({_named(error)}); check the network, or set training.dataset_path "
            'to a local copy, or use training.dataset = "pystdlib", which needs no network',
            key="training.dataset",
            value=name,
        ) from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
