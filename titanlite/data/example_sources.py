"""Sources of examples: files, or data sets of the Hugging Face hub, whose records an encoder reads."""

from __future__ import annotations

from pathlib import Path

from titanlite.config.run_config import HUB
from titanlite.data.files import JSON_SUFFIXES, find_files, is_compressed, require_path, with_compressed
from titanlite.data.local import JsonSource
from titanlite.data.readers import LinesReader, ParquetReader
from titanlite.data.sources import HUB_FORM, SOURCES, Source, SourceOptions
from titanlite.data.streamed import FileStream, HubStream, hub_address, open_hub
from titanlite.errors import ConfigError

_SUFFIXES = (".parquet", *with_compressed(*JSON_SUFFIXES))
_HINT = f"a folder of JSON lines or parquet files, a file, a glob, or {HUB_FORM}"


def _examples(options: SourceOptions, path: str) -> Source:
    """Return the records of JSON files, shuffled; or of compressed or parquet files, or of the hub, streamed."""
    if options.fields is None:
        raise ConfigError(
            "its records are examples, which have no text of their own; choose a source of texts",
            key="training.dataset",
            value=options.name,
        )
    if path.startswith(HUB):
        repo, subset = hub_address(path, "training.dataset_path")
        return HubStream(options, open_hub(options.name, repo, subset))
    files = find_files(path, _SUFFIXES)
    parquet = [_is_parquet(file) for file in files]
    if all(parquet):
        return FileStream(options, files, ParquetReader(*options.fields))
    if any(parquet):
        raise ConfigError(
            "must be either parquet or JSON files, not both; narrow it with a glob",
            key="training.dataset_path",
            value=path,
        )
    return FileStream(options, files, LinesReader()) if any(map(is_compressed, files)) else JsonSource(options, files)


def _is_parquet(file: Path) -> bool:
    return file.name.lower().endswith(".parquet")


@SOURCES.register("instruct")
def _instruct(options: SourceOptions) -> Source:
    return _examples(options, require_path("instruct", options.path, _HINT))


@SOURCES.register("chat")
def _chat(options: SourceOptions) -> Source:
    return _examples(options, require_path("chat", options.path, _HINT))


@SOURCES.register("hellaswag")
def _hellaswag(options: SourceOptions) -> Source:
    return _examples(options, options.path or f"{HUB}Rowan/hellaswag")
