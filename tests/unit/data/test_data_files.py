"""Which files a source reads, and the documents in them: the same for every format, and none left out in silence."""

from __future__ import annotations

import glob
import gzip
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titanlite.data import START, Source, build_source
from titanlite.errors import ConfigError

BOM = b"\xef\xbb\xbf"
DEEP = b'{"text": ' + b"[" * 200_000 + b"}"


def texts(source: Source, shards: int = 1) -> list[str]:
    dealt = (source.documents(shard, shards, 0, START) for shard in range(shards))
    return sorted(text for part in dealt for _, text in part)


def read(name: str, path: Path, **options: str) -> list[str]:
    return texts(build_source(name, path=str(path), seed=0, **options))


def lines(documents: Sequence[str], between: bytes = b"\n") -> bytes:
    return between.join(json.dumps({"text": text}).encode() for text in documents) + b"\n"


def write_text(file: Path, documents: Sequence[str]) -> None:
    file.write_text("\n".join(documents), newline="")


def write_json(file: Path, documents: Sequence[str]) -> None:
    file.write_bytes(lines(documents))


def write_parquet(file: Path, documents: Sequence[str | None], **columns: object) -> None:
    table = pyarrow.table({"text": pyarrow.array(documents, pyarrow.string()), **columns})
    pyarrow.parquet.write_table(table, file, row_group_size=7)


def write_zstd(file: Path, data: bytes) -> None:
    with pyarrow.CompressedOutputStream(pyarrow.OSFile(str(file), "wb"), "zstd") as stream:
        stream.write(data)


FORMATS: dict[str, tuple[str, Callable[..., None]]] = {
    "text": (".txt", write_text),
    "json": (".jsonl", write_json),
    "parquet": (".parquet", write_parquet),
    "fineweb_edu": (".parquet", write_parquet),
    "c4": (".json", write_json),
    "c4_test": (".json", write_json),
}


# ---- names and patterns


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("named", "matched"), [("x[0-9]", "x5"), ("q?", "qq"), ("st*r", "star"), ("x{1}", "x1"), ("a::b://c", "d")]
)
def test_a_name_that_exists_is_no_pattern(tmp_path: Path, name: str, named: str, matched: str) -> None:
    """As a file, as a folder, and as a folder in front of a pattern."""
    suffix, write = FORMATS[name]
    for place, text in ((named, "right"), (matched, "wrong")):
        (tmp_path / "files" / place).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / "files" / f"{place}{suffix}", [text])
        (tmp_path / "folders" / place).mkdir(parents=True)
        write(tmp_path / "folders" / place / f"a{suffix}", [text])
    for path in (f"files/{named}{suffix}", f"folders/{named}", f"folders/{named}/", f"folders/{named}/*{suffix}"):
        assert read(name, tmp_path / path) == ["right"]
    assert read(name, tmp_path / f"files/{matched[0]}*{suffix}") == (
        ["right", "wrong"] if matched[0] == named[0] else ["wrong"]
    )


def test_a_pattern_is_a_pattern(tmp_path: Path) -> None:
    for place in ("a1", "a2", "b1"):
        (tmp_path / place).mkdir()
        write_parquet(tmp_path / place / "x.parquet", [place])
    assert read("parquet", tmp_path / "a[12]" / "*") == ["a1", "a2"]
    assert read("parquet", tmp_path / "**" / "*.parquet") == ["a1", "a2", "b1"]


def test_a_name_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for folder, text in (("home", "home"), ("~", "here")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(text)
    assert texts(build_source("text", path="~/a.txt", seed=0)) == ["here"]
    (tmp_path / "~" / "a.txt").unlink()
    assert texts(build_source("text", path="~/a.txt", seed=0)) == ["home"]


def test_what_a_folder_has_beside_the_data_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "a.jsonl", ["a"])
    for name in ("b.jsonl.bz2", "c.csv", "README.md", "d.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".hidden").write_text("x")
    for _ in range(2):  # for training and for validation
        assert read("json", tmp_path) == ["a"]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "4 files" in record.message
    assert "NOT READ" in record.message
    assert "README.md, b.jsonl.bz2, c.csv" in record.message


def test_files_of_any_spelling_and_compression_are_read(tmp_path: Path) -> None:
    write_json(tmp_path / "a.JSONL", ["a"])
    write_json(tmp_path / "b.ndjson", ["b"])
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(["c"])) + gzip.compress(lines(["d"])))
    (tmp_path / "e.JSON.GZ").write_bytes(gzip.compress(BOM + lines(["e", "f"], between=b"\n \n\r\n")))
    (tmp_path / "g.json").write_text('\n[\n{"text": "g"},\n {"text": "\u00e9"}]\n')
    (tmp_path / "empty.json.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "nothing.json.gz").touch()
    (tmp_path / "nothing.json.zst").touch()
    write_zstd(tmp_path / "h.jsonl.zst", lines(["h"]))
    assert read("json", tmp_path) == ["a", "b", "c", "d", "e", "f", "g", "h", "é"]
    (tmp_path / "a.TXT").write_text("A")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(BOM + b"B"))
    write_zstd(tmp_path / "c.txt.zst", b"C")
    assert read("text", tmp_path) == ["A", "B", "C"]


def test_compressed_files_are_read_as_the_same_plain_ones(tmp_path: Path) -> None:
    """In documents, from a position, and in parts."""
    text = "".join(f"line {n} of a long file\n" for n in range(40_000)) + "word " * 50_000
    documents = [f"document {n}" for n in range(100)]
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "b.jsonl").write_bytes(lines(documents))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines(documents)))
    for name, file in (("text", "a.txt"), ("json", "b.jsonl")):
        plain, packed = (build_source(name, path=str(tmp_path / f), seed=0) for f in (file, f"{file}.gz"))
        assert texts(plain) == texts(packed) == texts(packed, shards=3)
        everything = list(packed.documents(1, 3, 0, START))
        assert list(packed.documents(1, 3, 0, everything[3][0])) == everything[3:]


def test_a_folder_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("A")
    (tmp_path / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "deep" / "self").symlink_to(".")
    assert read("text", tmp_path) == ["A"]


@pytest.mark.parametrize("pattern", ["", "**/*.txt", "**/**/?.txt", "**"])
def test_folders_that_link_to_each_other(tmp_path: Path, pattern: str) -> None:
    for one, other in (("a", "b"), ("b", "a")):
        (tmp_path / one).mkdir()
        (tmp_path / one / f"{one}.txt").write_text(one)
        (tmp_path / one / f"to_{other}").symlink_to(f"../{other}")
    assert sorted(read("text", tmp_path / pattern)) == ["a", "a", "b", "b"]  # each by its name, and by the link


@pytest.mark.parametrize(
    "pattern",
    ["**/*.txt", "**", "**/.h/*.txt", "**/.*", "a/**/?.txt", "*/**/b/*", "?/**/a/**/*.txt", "**/[ab]/*", ".h/**/*.txt"],
)
def test_a_pattern_for_any_depth_is_that_of_the_module_glob(tmp_path: Path, pattern: str) -> None:
    for folder in ("", "a", "a/b", "a/b/a", "b", "b/.h", ".h", ".h/a", "a/.h/b"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name in ("x.txt", ".y.txt", "z.rst"):
            (tmp_path / folder / name).write_text(f"{folder}/{name}")
    matches = {Path(match) for match in glob.glob(f"{tmp_path}/{pattern}", recursive=True)}
    files = sorted(str(file.relative_to(tmp_path).parent) + "/" + file.name for file in matches if file.is_file())
    assert sorted(text if text[0] != "/" else f".{text}" for text in read("text", tmp_path / pattern)) == files


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_a_folder_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    (tmp_path / "a.txt").write_text("A")
    (tmp_path / "closed").mkdir()
    listed = os.listdir

    def refusing(folder: str) -> list[str]:  # root may read every folder
        if Path(folder).name == "closed":
            raise PermissionError(13, "Permission denied", folder)
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    with pytest.raises(ConfigError, match="closed cannot be read"):
        read("text", tmp_path / pattern)


@pytest.mark.parametrize("name", ["a.parquet", "a.txt.zst", "a.jsonl.gz", "a.txt"])
def test_a_path_that_is_no_utf8(tmp_path: Path, name: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    folder.mkdir()
    write_parquet(tmp_path / "a.parquet", ["A"])  # pyarrow alone cannot write into the folder
    write_zstd(tmp_path / "a.txt.zst", b"A")
    for file in ("a.parquet", "a.txt.zst"):
        (tmp_path / file).rename(folder / file)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(["A"])))
    (folder / "a.txt").write_text("A")
    source = {"parquet": "parquet", "jsonl": "json", "txt": "text"}[name.split(".")[1]]
    assert read(source, folder / name) == ["A"]


def test_a_compressed_json_array(tmp_path: Path) -> None:
    documents = ["A", "ü]", "C" * 10_000, ""]
    array = json.dumps([{"text": text} for text in documents], indent=1, ensure_ascii=False).encode()
    for name, data in (("a", array), ("mark", b"\xef\xbb\xbf" + array), ("empty", b"[]")):
        (tmp_path / f"{name}.json").write_bytes(data)
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(data))
        write_zstd(tmp_path / f"{name}.json.zst", data)
    for name in ("a", "mark"):
        for suffix in ("json", "json.gz", "json.zst"):
            assert sorted(read("json", tmp_path / f"{name}.{suffix}")) == sorted(documents)
    source = build_source("json", path=str(tmp_path / "a.json.gz"), seed=0)
    everything = list(source.documents(0, 1, 0, START))
    assert list(source.documents(0, 1, 0, everything[2][0])) == everything[2:]
    with pytest.raises(ConfigError, match="no document"):
        read("json", tmp_path / "empty.json.gz")


def test_a_compressed_json_array_of_absurd_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlite.data import spans

    monkeypatch.setattr(spans, "LONGEST_RECORD", 10_000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 20_000))
    with pytest.raises(ConfigError, match="is a JSON array of more than"):
        read("json", tmp_path / "a.json.gz")


def test_places_are_computed_for_messages_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To find the line of each document that is left out would take the square of their number."""
    from titanlite.data import local

    places: list[int] = []
    line_at = local.line_at

    def noting(file: Path, offset: int) -> int:
        places.append(offset)
        return line_at(file, offset)

    monkeypatch.setattr(local, "line_at", noting)
    (tmp_path / "a.jsonl").write_bytes(b'{"other": 1}\n{"text": "A"}\n' * 50)
    assert read("json", tmp_path / "a.jsonl", on_corrupt="skip") == ["A"] * 50
    assert len(places) == 1


def test_few_rows_at_a_time_where_parquet_rows_are_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titanlite.data import readers

    monkeypatch.setattr(readers, "_BATCH_BYTES", 16_000)
    file = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{i} " * 1500 for i in range(10)], "wide": [[f"{i} " * 9000] for i in range(10)]})
    pyarrow.parquet.write_table(table, file, use_dictionary=False, write_statistics=False)
    with pyarrow.parquet.ParquetFile(file) as opened:
        assert readers._rows(opened, ["text"]) == 5  # 3,000 bytes and a little
        assert readers._rows(opened, ["wide"]) == 1
    assert [text[0] for text in read("parquet", file)] == list("0123456789")


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_a_pipe_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="is a pipe or a device"):
        read(name, tmp_path / "a.txt")
    with pytest.raises(ConfigError, match="has no files named"):
        read(name, tmp_path)


# ---- what is in the files


def test_parquet_files_may_differ_in_other_columns(tmp_path: Path) -> None:
    write_parquet(tmp_path / "0.parquet", ["a"])
    write_parquet(tmp_path / "1.parquet", ["b"], score=pyarrow.array([None], pyarrow.float32()))
    write_parquet(tmp_path / "2.parquet", ["c", "d"], score=["high", "low"], **{"text.x": [1, 2]})
    table = pyarrow.table({"z": [{"text": 1}], "text": pyarrow.array(["e"], pyarrow.large_string())})
    pyarrow.parquet.write_table(table, tmp_path / "3.parquet")
    table = pyarrow.table({"text": pyarrow.array(["f"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "4.parquet")
    assert read("parquet", tmp_path) == ["a", "b", "c", "d", "e", "f"]
    assert read("fineweb_edu", tmp_path) == ["a", "b", "c", "d", "e", "f"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file_is_empty(tmp_path: Path, name: str) -> None:
    suffix, write = FORMATS[name]
    (tmp_path / f"a{suffix}").touch()
    write(tmp_path / f"b{suffix}", [])
    with pytest.raises(ConfigError, match="there is no document in it"):
        read(name, tmp_path)
    write(tmp_path / f"c{suffix}", ["full"])
    assert [text for text in read(name, tmp_path) if text.strip()] == ["full"]


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(BOM + b"text")
    assert read("text", tmp_path) == ["text"]
    (tmp_path / "a.jsonl").write_bytes(BOM + lines(["a"]) + BOM + lines(["b"]) + BOM + b"\n")
    assert read("json", tmp_path) == ["a", "b"]
    (tmp_path / "a.jsonl").write_bytes(BOM + b'[{"text": "a"}]')
    assert read("json", tmp_path) == ["a"]


@pytest.mark.parametrize(
    "between", [b"\n   \n", b"\r\n", b"\r\n\r\n", b"\n\t \r\n", b"\n\n", b"\n   ", b"\n\x0c\x0b\n"]
)
def test_lines_of_blanks(tmp_path: Path, between: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(["a", "b", "c\r\n\0"], between=between) + b"  ")
    source = build_source("json", path=str(tmp_path), seed=0)
    assert source.identity["documents"] == 3
    assert texts(source) == ["a", "b", "c\r\n\0"]


def test_a_json_array(tmp_path: Path) -> None:
    documents = [{"text": "a ] , [ \u00e9\u4e2d"}, {"text": "b\n"}, {"other": [1, {}], "text": "c"}]
    file = tmp_path / "a.json"
    for indent in (None, 4):
        file.write_text(json.dumps(documents, indent=indent, ensure_ascii=False), encoding="utf-8")
        assert read("json", tmp_path) == read("c4", tmp_path) == sorted(document["text"] for document in documents)
    file.write_text('[{"text": "a"},\n {"text": "b"},\n {"text": broken},\n {"text": "c"}]')
    with pytest.raises(ConfigError, match=r"a\.json, line 3: not JSON"):
        read("json", tmp_path)
    assert read("json", tmp_path, on_corrupt="skip") == ["a", "b"]
    file.write_text('[1]\n{"text": "c"}\n[2]')  # lines after all
    assert read("json", tmp_path, on_corrupt="skip") == ["c"]


# ---- documents that cannot be read


@pytest.mark.parametrize("name", ["json", "c4"])
@pytest.mark.parametrize(
    ("line", "why"),
    [
        (DEEP, "nested too deeply"),
        (rb'{"text": "\ud800"}', "surrogate"),
        (b'{"text": "\xc3', "invalid UTF-8"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not JSON"),
        (b"\0" * 100, "not JSON"),
        (b'{"text": NaN}', r"not a string \(float\)"),
    ],
    ids=["deep", "surrogate", "cut", "digits", "nul", "nan"],
)
def test_a_bad_line_is_named_or_left_out(tmp_path: Path, name: str, line: bytes, why: str) -> None:
    (tmp_path / "a.json").write_bytes(lines(["a", "b"]) + line + b"\n" + lines(["c"]))
    with pytest.raises(ConfigError, match=rf"a\.json, (line|document) 3: .*{why}"):
        read(name, tmp_path)
    source = build_source(name, path=str(tmp_path), on_corrupt="skip", seed=0)
    assert texts(source) == ["a", "b", "c"]
    assert source.skipped == 1


@pytest.mark.parametrize("name", ["json", "parquet", "c4"])
def test_the_message_for_a_missing_field_helps(tmp_path: Path, name: str) -> None:
    """It names the option, the fields there are, the first document of the first file, and how many are like it."""
    for number in range(2):
        if name == "parquet":
            table = pyarrow.table({"body": ["x"] * 30, "y" * 50: ["u"] * 30})
            pyarrow.parquet.write_table(table, tmp_path / f"{number}.parquet")
        else:
            record = {"body": "x", "y" * 50: 1, **{f"f{n}": 0 for n in range(20)}}
            (tmp_path / f"{number}.json").write_text((json.dumps(record) + "\n") * 60)
    for seed in range(3):
        with pytest.raises(ConfigError) as error:
            texts(build_source(name, path=str(tmp_path), seed=seed))
        message = str(error.value)
        assert f"{tmp_path}/" in message
        assert ", line 1: " in message if name == "json" else " 1: " in message
        assert f", {60 if name == 'parquet' else 100} have this fault" in message
        assert 'no field "text"' in message
        assert "data.text_field" in message
        assert f"body, {'y' * 40}..." in message
        assert len(message) < 600 + len(str(tmp_path))


def test_parquet_rows_that_are_no_text(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([b"fine", b"\xff\xfe", b"cut \xe4\xb8"], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"row 1: .*is not a string \(bytes\)"):
        read("parquet", tmp_path)
    broken = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"ok\xff\xfe")
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    source = build_source("parquet", path=str(tmp_path), on_corrupt="skip", seed=0)
    assert (texts(source), source.skipped) == (["ok"], 1)


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compressed file of a few KiB that has gigabytes on a line: with the limit at 1 MiB, what is read is bounded."""
    from titanlite.data import readers, records, spans

    for module in (readers, records, spans):
        monkeypatch.setattr(module, "LONGEST_RECORD", 1 << 20)
    bomb = lines(["a"]) + b'{"text": "' + b"x" * (64 << 20) + b'"}\n' + lines(["b"])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(bomb))
    (tmp_path / "b.jsonl").write_bytes(bomb)
    for file in ("a.jsonl.gz", "b.jsonl"):
        source = build_source("json", path=str(tmp_path / file), on_corrupt="skip", seed=0)
        assert texts(source) == ["a", "b"]
        assert source.skipped == 1
    (tmp_path / "c.json").write_bytes(b"[" + b" " * (2 << 20) + b"]")
    with pytest.raises(ConfigError, match=r"c\.json is a JSON array of more than 1 MiB"):
        read("json", tmp_path / "c.json")


@pytest.mark.parametrize("name", ["json", "text"])
def test_damaged_compressed_files(tmp_path: Path, name: str) -> None:
    file = tmp_path / ("a.jsonl.gz" if name == "json" else "a.txt.gz")
    whole = gzip.compress(b"".join(lines([os.urandom(300).hex()]) for _ in range(500)))
    for damaged in (whole[: len(whole) // 2], whole[:-20] + b"x" * 20, b"no gzip at all", whole[:5]):
        file.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"a\.\w+\.gz: reading failed .*; replace the file"):
            read(name, tmp_path)
