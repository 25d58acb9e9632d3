"""Indexes of corpora that are kept between runs."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from titanlite.data import build_source
from titanlite.data.index_cache import corpus_index
from titanlite.data.spans import json_spans
from titanlite.environment import CACHE_DIR

pytestmark = pytest.mark.slow  # of corpora that are large enough

LINES = 300  # of 80 KiB each: three files are large enough for an index
REST = "x" * (80 << 10)


def lines(file: Path, label: str, count: int = LINES) -> None:
    file.write_text("".join(json.dumps({"text": f"{label} {i} {REST}"}) + "\n" for i in range(count)))


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in "abc":
        lines(folder / f"{name}.jsonl", name)
    return folder


class Reads:
    """Reads the spans of a file, and notes the name of the file in a log that processes share."""

    def __init__(self, log: Path) -> None:
        self._log = log

    def __call__(self, file: Path) -> np.ndarray:
        with self._log.open("a") as log:
            log.write(file.stem)
        return json_spans(file)

    def since_last(self) -> str:
        text = self._log.read_text() if self._log.exists() else ""
        self._log.unlink(missing_ok=True)
        return text


def begins(files: list[Path], read: Reads) -> list[str]:
    """The first words of each document, by the index."""
    index = corpus_index(files, "json", read)
    texts = []
    for i, (begin, _) in enumerate(index.entries.tolist()):
        with files[index.file_of(i)].open() as stream:
            stream.seek(begin)
            texts.append(stream.read(30).removeprefix('{"text": "').partition(" x")[0])
    return texts


def expected(*files: tuple[str, int]) -> list[str]:
    return [f"{name} {i}" for name, count in files for i in range(count)]


def test_an_index_is_made_once_and_a_changed_file_is_noticed(corpus: Path, tmp_path: Path) -> None:
    files, read = sorted(corpus.iterdir()), Reads(tmp_path / "log")
    assert begins(files, read) == expected(("a", LINES), ("b", LINES), ("c", LINES))
    assert read.since_last() == "abc"
    assert begins(files, read) == expected(("a", LINES), ("b", LINES), ("c", LINES))
    assert read.since_last() == ""
    status = files[1].stat()
    lines(files[1], "B")  # of the same size, and as old
    os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert begins(files, read) == expected(("a", LINES), ("B", LINES), ("c", LINES))
    assert read.since_last() == "b"
    lines(files[0], "longer", LINES + 7)
    assert begins(files, read) == expected(("longer", LINES + 7), ("B", LINES), ("c", LINES))
    assert read.since_last() == "a"
    kept = sorted(path.suffix for path in (tmp_path / "cache" / "data").iterdir())
    assert kept == [".json", ".lock", ".npy"]  # no entries of before
    (entries,) = (tmp_path / "cache" / "data").glob("*.npy")
    for damage in (b"", entries.read_bytes()[:-8], b"{" * 4096):
        entries.write_bytes(damage)
        assert begins(files, read) == expected(("longer", LINES + 7), ("B", LINES), ("c", LINES))
        assert read.since_last() == "abc"


def test_processes_that_start_together_make_one_index(corpus: Path, tmp_path: Path) -> None:
    files, read = sorted(corpus.iterdir()), Reads(tmp_path / "log")
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.starmap(begins, [(files, read)] * 4, chunksize=1)
    assert all(result == results[0] for result in results)
    assert len(results[0]) == 3 * LINES
    assert read.since_last() == "abc"


def test_a_source_reads_the_same_documents_with_and_without_an_index(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def heads() -> list[str]:
        return [text[:8] for text in build_source("json", path=str(corpus), seed=1).in_order()]

    first, second = heads(), heads()
    monkeypatch.setenv(CACHE_DIR, str(corpus / "a.jsonl"))  # no folder
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert heads() == first == second
    assert f"name another folder with {CACHE_DIR}" in caplog.text


def test_the_rows_of_parquet_files_are_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    monkeypatch.setenv(CACHE_DIR, str(tmp_path / "cache"))
    text = [f"{i} {REST}" for i in range(500)]
    for name in ("a", "b"):
        table = pa.table({"text": text})
        parquet.write_table(table, tmp_path / f"{name}.parquet", compression="none", use_dictionary=False)
    caplog.set_level(logging.INFO)
    shards = []
    for _ in range(2):
        caplog.clear()
        source = build_source("parquet", path=str(tmp_path), seed=1)
        shards.append((source.num_shards(64), sum(1 for _ in source.in_order())))
    assert shards == [(32, 1000)] * 2
    assert "for an index" not in caplog.text
