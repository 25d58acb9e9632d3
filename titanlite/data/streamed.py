"""Sources streamed with the ``datasets`` library: local parquet files, and data sets of the Hugging Face hub."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from titanlite.data.files import find_files, require_path, unreadable
from titanlite.data.sources import SOURCES, Position, Source, SourceOptions, permutation
from titanlite.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

# File name suffix -> name of the format in `datasets`, for local copies of data sets of the hub.
_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".json.gz": "json", ".jsonl.gz": "json"}
_PROBE_TIMEOUT_S = 10.0


class StreamedSource(Source):
    """A source that reads files from beginning to end. The files are shuffled with the seed and dealt to the shards.

    With V shards, F files and V <= F, shard i reads the shuffled files i, i + V, i + 2V, ... With V > F, several shards
    read the same file, and each keeps a part of its documents and skips the rest. So streaming is fastest if there are
    at least as many files as sequences in the global batch. The order in a file is kept. Shards of different sizes
    start their next epochs at different times. A resumed run reads the current file again up to its position, but not
    the files before it.
    """

    def __init__(self, options: SourceOptions, stream: IterableDataset, files: list[Path]) -> None:
        super().__init__(options)
        self._stream = stream
        self.files = files
        self._num_parts = int(stream.num_shards)
        self.identity["files"] = self._num_parts
        self._order = permutation(self._num_parts, options.seed).tolist()

    def num_shards(self, at_most: int) -> int:
        """Return ``at_most``, because the number of documents in a stream is unknown."""
        return at_most

    def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
        groups = min(num_shards, self._num_parts)
        group, member = shard % groups, shard // groups
        members = len(range(group, num_shards, groups))
        for part in range(group, self._num_parts, groups):
            if part < start.part:
                continue
            first = start.document if part == start.part else 0
            file = self._order[part]
            for row, record in self._records(file, first):
                if row % members == member:
                    text = self._text_of(record, file, row)
                    if text is not None:
                        yield Position(part, row), text

    def _records(self, file: int, first: int) -> Iterator[tuple[int, dict[str, object]]]:
        try:
            stream = self._stream.shard(num_shards=self._num_parts, index=file)
            yield from enumerate(stream.skip(first), start=first)
        except Exception as error:  # any exception of the reader of the format, or of the network
            problem = f"{self._name_of(file)}: reading failed ({type(error).__name__}: {_first_line(error)})"
            if self.files:
                raise ConfigError(f"{problem}; replace the file or leave it out of training.dataset_path") from error
            raise TrainingError(
                f"{problem}; start the run again to continue from its last checkpoint, or use a local copy "
                "through training.dataset_path"
            ) from error

    def _text_of(self, record: dict[str, object], file: int, row: int) -> str | None:
        field = self.options.text_field
        text = record.get(field)
        if isinstance(text, str):
            return text
        fields = ", ".join(record)
        problem = (
            f'the field "{field}" is not a string' if field in record else f'no field "{field}" (it has: {fields})'
        )
        self.corrupt(f"{self._name_of(file)}, row {row + 1}", problem)
        return None

    def _name_of(self, file: int) -> str:
        return str(self.files[file]) if self.files else f"{self.options.name}, file {file} of {self._num_parts}"


@SOURCES.register("parquet")
def _parquet(options: SourceOptions) -> Source:
    path = require_path("parquet", options.path, "a folder of .parquet files, a file, or a glob")
    return _stream_files(options, find_files(path, (".parquet",)), "parquet")


@SOURCES.register("c4")
def _c4(options: SourceOptions) -> Source:
    return _hub_or_copy(options, "allenai/c4", "en")


@SOURCES.register("fineweb_edu")
def _fineweb_edu(options: SourceOptions) -> Source:
    return _hub_or_copy(options, "HuggingFaceFW/fineweb-edu", "sample-10BT")


def _hub_or_copy(options: SourceOptions, repo: str, subset: str) -> Source:
    if options.path:
        files = find_files(options.path, tuple(_FORMATS))
        formats = {fmt for file in files for suffix, fmt in _FORMATS.items() if file.name.endswith(suffix)}
        if len(formats) != 1:
            raise ConfigError(
                f"a local copy of {repo} must be either parquet or JSON "
                f"lines, not {' and '.join(sorted(formats)) or 'other files'}; narrow it with a glob",
                key="training.dataset_path",
                value=options.path,
            )
        return _stream_files(options, files, formats.pop())
    return StreamedSource(options, _open_hub(options.name, repo, subset), [])


def _stream_files(options: SourceOptions, files: list[Path], file_format: str) -> Source:
    from datasets import load_dataset

    for file in files:
        try:
            file.open("rb").close()
        except OSError as error:
            raise unreadable(file, error) from error
    names = [str(file) for file in files]
    try:
        stream = load_dataset(file_format, data_files={"train": names}, split="train", streaming=True)
    except Exception as error:  # datasets reads the header of the first file; its reader can raise any exception
        raise ConfigError(
            f"cannot be read as {file_format} ({type(error).__name__}: {_first_line(error)}); replace the damaged file",
            key="training.dataset_path",
            value=options.path,
        ) from error
    return StreamedSource(options, stream, files)


def _open_hub(name: str, repo: str, subset: str) -> IterableDataset:
    from datasets import load_dataset
    from huggingface_hub import HfApi

    logger.info(f"{name}: streaming {repo} ({subset}) from the Hugging Face hub")
    try:
        # A request with a timeout first: without a network, load_dataset alone retries for 20 seconds or more.
        HfApi().dataset_info(repo, timeout=_PROBE_TIMEOUT_S)
        return load_dataset(repo, subset, split="train", streaming=True)
    except Exception as error:  # exceptions of the hub library and of its HTTP library
        raise ConfigError(
            f"{repo} cannot be read from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}); check the network, or set training.dataset_path "
            'to a local copy, or use training.dataset = "pystdlib", which needs no network',
            key="training.dataset",
            value=name,
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]
