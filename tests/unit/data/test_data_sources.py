"""Local sources: which files they read, how documents are dealt, and the message for everything that is wrong."""

from __future__ import annotations

import itertools
import json
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from titanlite.data import SOURCES, START, Position, Source, SourceOptions, build_source
from titanlite.errors import ConfigError


def texts(source: Source, shard: int = 0, num_shards: int = 1, epoch: int = 0) -> list[str]:
    return [text for _, text in source.documents(shard, num_shards, epoch, START)]


def test_pystdlib_is_the_library_without_tests_and_packages() -> None:
    source = build_source("pystdlib", seed=0)
    documents = texts(source)
    assert len(documents) == source.identity["documents"]
    assert len(documents) > 300
    assert sum(len(text) for text in documents) > 5_000_000
    corpus = "\n".join(documents)
    stdlib = Path(sysconfig.get_path("stdlib"))
    assert (stdlib / "json" / "decoder.py").read_text() in corpus
    assert "import pytest" not in corpus
    assert "class JSONTestSuite" not in corpus
    assert "# system configuration generated and used by the sysconfig module\nbuild_time_vars" not in corpus


def test_pystdlib_takes_no_path() -> None:
    with pytest.raises(ConfigError, match=r'training.dataset_path = "x": .* takes no path; leave it empty'):
        build_source("pystdlib", path="x", seed=0)


def test_pystdlib_of_a_python_without_sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(ConfigError, match=r'has no library source .* use training.dataset = "text"'):
        build_source("pystdlib", seed=0)


def test_folder_file_and_glob(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "deep" / "b.txt").write_text("B")
    (tmp_path / "deep" / "er" / "c.md").write_text("C")
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden.txt").write_text("H")
    assert sorted(texts(build_source("text", path=str(tmp_path), seed=0))) == ["A", "B"]
    assert texts(build_source("text", path=f"{tmp_path}/a.txt", seed=0)) == ["A"]
    assert sorted(texts(build_source("text", path=f"{tmp_path}/**/*.[mt]*", seed=0))) == ["A", "B", "C"]


def test_big_files_are_cut_at_line_ends(tmp_path: Path) -> None:
    content = "".join(f"line {n} é\n" for n in range(30_000))
    (tmp_path / "big.txt").write_text(content, encoding="utf-8")
    (tmp_path / "no_line_end.txt").write_text("x" * 200_000)
    (tmp_path / "limit.txt").write_text("y" * 65_536)
    source = build_source("text", path=str(tmp_path / "big.txt"), seed=0)
    documents = texts(source)
    size = len(content.encode())
    assert len(documents) == -(-size // 65_536)
    assert all(text.endswith("\n") and len(text.encode()) < 65_536 + 20 for text in documents)
    by_number = sorted(documents, key=lambda text: int(text.split()[1]))
    assert "".join(by_number) == content
    assert source.num_shards(8) == 1
    assert sorted(map(len, texts(build_source("text", path=f"{tmp_path}/[nl]*", seed=0)))) == [
        65_536,
        65_536,
        65_536,
        200_000 - 2 * 65_536,
    ]


@pytest.mark.parametrize(
    ("documents", "batch", "shards"),
    [(1, 8, 1), (31, 8, 1), (32, 8, 2), (100, 8, 4), (128, 8, 8), (10_000, 8, 8), (100, 6, 6), (100, 7, 1)],
)
def test_number_of_shards(tmp_path: Path, documents: int, batch: int, shards: int) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * documents)
    assert build_source("json", path=str(tmp_path), seed=0).num_shards(batch) == shards


def test_documents_are_dealt_by_seed_and_reshuffled_by_epoch(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(64)))

    def dealt(seed: int, epoch: int) -> list[list[str]]:
        source = build_source("json", path=str(tmp_path), seed=seed)
        return [texts(source, shard, 4, epoch) for shard in range(4)]

    first, again, later, other = dealt(1, 0), dealt(1, 0), dealt(1, 1), dealt(2, 0)
    assert first == again
    assert sorted(itertools.chain(*first), key=int) == [str(n) for n in range(64)]
    assert all(one != two and sorted(one) == sorted(two) for one, two in zip(first, later))
    assert all(sorted(one) != sorted(two) for one, two in zip(first, other))
    # Pinned: a run resumed under another numpy or titanlite must see the same order.
    assert first[0][:8] == ["42", "48", "57", "27", "51", "45", "12", "1"]


def test_documents_continue_from_a_position(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(20)))
    source = build_source("json", path=str(tmp_path), seed=1)
    everything = list(source.documents(1, 2, 3, START))
    for number, (position, _) in enumerate(everything):
        assert list(source.documents(1, 2, 3, position)) == everything[number:]


def test_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\r\n\r\n\n{"text": "two\\n", "url": 3}')
    (tmp_path / "b.json").write_text('{"text": ""}\n{"body": "x", "text": "thr\u00e9\u00e9"}\n', encoding="utf-8")
    assert sorted(texts(build_source("json", path=str(tmp_path), seed=0))) == ["", "one", "thréé", "two\n"]
    (tmp_path / "c.jsonl").write_text('{"body": "four"}\n')
    assert texts(build_source("json", path=f"{tmp_path}/c.jsonl", text_field="body", seed=0)) == ["four"]


CORRUPT = {
    '{"text": "cut': r"not JSON \(Unterminated string",
    "[1]": "a JSON list, not an object; every line must be one object",
    '{"body": "x", "url": 1}': r'no field "text" \(it has: body, url\)',
    r'{"text": "half \ud83d"}': 'the field "text" has half of a surrogate pair',
    '{"text": null}': 'the field "text" is not a string',
    '{"text": "\udcff"}': r"invalid UTF-8 \(invalid start byte\)",
}


@pytest.mark.parametrize("line", CORRUPT)
def test_corrupt_json_lines_stop_or_are_skipped(tmp_path: Path, line: str, caplog: pytest.LogCaptureFixture) -> None:
    good = '{"text": "fine"}'
    content = f"{good}\n\n{line}\n{good}\n{line}\n"
    (tmp_path / "a.jsonl").write_bytes(content.encode("utf-8", "surrogateescape"))
    where = r"a\.jsonl, line [35]: "
    with pytest.raises(ConfigError, match=where + CORRUPT[line] + '.*data.on_corrupt = "skip"'):
        texts(build_source("json", path=str(tmp_path), seed=0))
    source = build_source("json", path=str(tmp_path), on_corrupt="skip", seed=0)
    with caplog.at_level(logging.WARNING):
        assert texts(source) == ["fine", "fine"]
    assert source.skipped == 2
    assert len(caplog.records) == 1
    assert "left out" in caplog.text


def test_invalid_utf8_text(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"line\n" * 20_000 + b"\xff\n" + b"line\n" * 10)
    with pytest.raises(ConfigError, match=r"bad\.txt, line 20001: invalid UTF-8"):
        texts(build_source("text", path=str(tmp_path), seed=0))
    source = build_source("text", path=str(tmp_path), on_corrupt="skip", seed=0)
    assert len(texts(source)) == 1
    assert source.skipped == 1


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_a_source_that_needs_a_path(name: str) -> None:
    message = rf'training.dataset = "{name}": reads local files, and training.dataset_path is empty; set .* to a folder'
    with pytest.raises(ConfigError, match=message):
        build_source(name, seed=0)


@pytest.mark.parametrize("name", ["text", "json", "parquet", "c4_test", "c4"])
def test_missing_path(name: str) -> None:
    message = r'training.dataset_path = "no/such": there is no such file or folder \(a path is relative to'
    with pytest.raises(ConfigError, match=message):
        build_source(name, path="no/such", seed=0)


def test_path_without_matching_files(tmp_path: Path) -> None:
    (tmp_path / "a.rst").write_text("x")
    with pytest.raises(ConfigError, match=r"no files named \.txt, .* 1 file with other names, .* a\.rst; .* a glob"):
        build_source("text", path=str(tmp_path), seed=0)
    with pytest.raises(ConfigError, match=r"the folder has no files named \.json, \.jsonl, "):
        build_source("json", path=str(tmp_path), seed=0)
    with pytest.raises(ConfigError, match="no file matches this glob"):
        build_source("text", path=f"{tmp_path}/*.txt", seed=0)


def test_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.json").write_text("\n\n")
    for name in ("text", "json"):
        with pytest.raises(ConfigError, match=r"training.dataset_path = .*there is no document in it"):
            build_source(name, path=str(tmp_path), seed=0)


@pytest.mark.parametrize(("name", "suffix"), [("text", "txt"), ("json", "json"), ("parquet", "parquet")])
def test_unreadable_file(tmp_path: Path, name: str, suffix: str) -> None:
    """A dangling link, because permissions do not stop a test that runs as root."""
    (tmp_path / f"a.{suffix}").symlink_to(tmp_path / "gone")
    with pytest.raises(ConfigError, match=rf"training.dataset_path: .*a\.{suffix} cannot be read \(No such file"):
        build_source(name, path=str(tmp_path), seed=0)


def test_file_that_vanishes_while_training(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    source = build_source("text", path=str(tmp_path), seed=0)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(ConfigError, match=r"a\.txt cannot be read"):
        texts(source)


def test_c4_test_is_a_local_sample(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r'one object with "text" per line.*training.dataset = "pystdlib"'):
        build_source("c4_test", seed=0)
    (tmp_path / "data.json").write_text(json.dumps({"text": "hello"}))
    assert texts(build_source("c4_test", path=str(tmp_path), seed=0)) == ["hello"]


def test_unknown_names_and_values() -> None:
    with pytest.raises(ConfigError, match=r'training.dataset = "pystdlb": there is no such data source .*"pystdlib"'):
        build_source("pystdlb", seed=0)
    with pytest.raises(ConfigError, match=r'data.on_corrupt = "ignore": must be "stop" or "skip"'):
        build_source("pystdlib", on_corrupt="ignore", seed=0)
    with pytest.raises(ConfigError, match=r"training.seed = -1"):
        build_source("pystdlib", seed=-1)


def test_a_third_party_source(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(Source):
        def num_shards(self, at_most: int) -> int:
            return at_most

        def documents(self, shard: int, num_shards: int, epoch: int, start: Position) -> Iterator[tuple[Position, str]]:
            yield from ((Position(0, n), str(n)) for n in range(start.document, 10) if n % num_shards == shard)

    monkeypatch.setattr(SOURCES, "_entries", dict(SOURCES._entries))

    @SOURCES.register("counting")
    def _counting(options: SourceOptions) -> Source:
        return Counting(options)

    assert texts(build_source("counting", seed=0), 1, 4) == ["1", "5", "9"]
