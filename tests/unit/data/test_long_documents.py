"""Long documents: cut alike in every source, at safe places, in bounded memory; and what that means for a resume."""

from __future__ import annotations

import io
import json
import resource
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.forks import on_ranks
from titanlite.data import DataLoader, build_source, load_tokenizer
from titanlite.data.cut import PIECE_BYTES, cut, pieces
from titanlite.data.spans import piece_spans
from titanlite.errors import ConfigError

TOKENIZER = load_tokenizer()
WORDS = " ".join(f"word{n} of a, sentence. 12 {n}" for n in range(7_000))  # 0.2 MB on one line
CHINESE = "第一章，他说。" * 8_000
TEXTS = {
    "words": WORDS,
    "lines": WORDS.replace(".", ".\n"),
    "crlf": WORDS.replace(".", "\r\n"),
    "spaces": WORDS.replace(" ", "   "),
    "chinese": CHINESE,
    "digits": "".join(map(str, range(40_000))),
    "emoji": "\U0001f600" * 40_000,
    "nul": "\0" * 140_000,
    "lines of all lengths": "".join("x" * n + "\n" for n in range(900)) + "y" * 150_000 + "\n" + "z" * 131_072,
}


def write(folder: Path, kind: str, text: str) -> Path:
    file = folder / f"a.{kind}"
    if kind == "txt":
        file.write_bytes(text.encode())
    elif kind == "jsonl":
        file.write_text(json.dumps({"text": text}) + "\n")
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": [text]}), file)
    return file


SOURCES = {"txt": "text", "jsonl": "json", "parquet": "parquet"}


def make_loader(file: Path, **changes: Any) -> DataLoader:
    sizes = {"seq_len": 64, "global_batch_size": 4, "local_batch_size": 4, "dp_rank": 0, "dp_degree": 1}
    return DataLoader(build_source(SOURCES[file.suffix[1:]], path=str(file), seed=0), TOKENIZER, **(sizes | changes))


@pytest.mark.parametrize("name", TEXTS)
def test_pieces_are_the_text_and_about_64_kib(tmp_path: Path, name: str) -> None:
    text = TEXTS[name]
    parts = list(cut(text))
    assert "".join(parts) == text
    assert len(parts) > 1
    sizes = [len(part.encode()) for part in parts]
    assert all(PIECE_BYTES <= size <= 2 * PIECE_BYTES for size in sizes[:-1])
    assert sizes[-1] <= 2 * PIECE_BYTES
    assert all(list(cut(part)) == [part] for part in parts)  # a piece is not cut again
    file = write(tmp_path, "txt", text)
    assert [text.encode()[begin:end].decode() for begin, end in piece_spans(file)] == parts


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["a", " b", "\n", "é", "。", "\ufeff", "\0"]), st.integers(1, 70_000))))
def test_no_byte_is_lost(runs: list[tuple[str, int]]) -> None:
    text = "".join(part * count for part, count in runs)
    assert b"".join(pieces(io.BytesIO(text.encode()))) == text.encode()
    assert "".join(cut(text)) == text


@pytest.mark.parametrize("data", [b"\x80" * 300_000, b"\xff\xe4" * 100_000, b"a" * 65_535 + b"\xe4\xb8" * 50_000])
def test_bytes_that_are_no_text_are_cut_too(data: bytes) -> None:
    parts = list(pieces(io.BytesIO(data)))
    assert b"".join(parts) == data
    assert max(map(len, parts)) <= 2 * PIECE_BYTES


@pytest.mark.parametrize("name", ["words", "lines", "crlf", "spaces", "chinese"])
def test_pieces_have_the_tokens_of_the_whole(name: str) -> None:
    text = TEXTS[name]
    assert [i for part in cut(text) for i in TOKENIZER.encode(part)] == TOKENIZER.encode(text)


@pytest.mark.parametrize("name", TEXTS)
def test_every_source_cuts_alike(tmp_path: Path, name: str) -> None:
    """The stream of each format is BOS + piece + EOS for the pieces of the rule; text shuffles them."""
    expected = sorted([TOKENIZER.bos_id, *TOKENIZER.encode(part), TOKENIZER.eos_id] for part in cut(TEXTS[name]))
    total = sum(map(len, expected))
    for kind in SOURCES:
        loader = make_loader(write(tmp_path, kind, TEXTS[name]), global_batch_size=1, local_batch_size=1)
        tokens = [i for batch in islice(loader, total // 64 + 1) for i in batch.inputs.flatten().tolist()][:total]
        loader.close()
        begins = [at for at, token in enumerate(tokens) if token == TOKENIZER.bos_id]
        assert sorted(tokens[a:b] for a, b in zip(begins, [*begins[1:], total])) == expected


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("steps", [1, 150, 400])
def test_resume_inside_a_long_document(tmp_path: Path, kind: str, steps: int) -> None:
    file = write(tmp_path, kind, WORDS)
    whole, resumed = make_loader(file), make_loader(file)
    for _ in range(steps):
        next(whole)
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    for _ in range(3):
        assert next(resumed).inputs.equal(next(whole).inputs)
    assert resumed.state_dict() == whole.state_dict()
    whole.close()
    resumed.close()


def as_before(state: dict[str, Any]) -> dict[str, Any]:
    """The state as versions wrote it that did not cut records."""
    shards = {shard: place[:4] for shard, place in state["shards"].items()}
    return {"step": state["step"], "identity": state["identity"], "shards": shards}


def test_an_older_position_is_continued_exactly_or_refused(tmp_path: Path) -> None:
    short, long = json.dumps({"text": "short " * 50}), json.dumps({"text": WORDS})
    for kind, content in (("no long", [short] * 40), ("long", [short] * 20 + [long])):
        folder = tmp_path / kind
        folder.mkdir()
        (folder / "a.jsonl").write_text("\n".join(content))
    first, second = (make_loader(tmp_path / "no long" / "a.jsonl") for _ in range(2))
    next(first)
    second.load_state_dict(as_before(first.state_dict()))
    for _ in range(60):
        assert next(first).inputs.equal(next(second).inputs)
    assert "reading" in first.state_dict()
    assert "reading" not in second.state_dict()  # a later resume is as careful
    first.close()
    second.close()
    loader = make_loader(tmp_path / "long" / "a.jsonl")
    loader.load_state_dict(as_before(loader.state_dict()))
    with pytest.raises(ConfigError, match=r"is long and is cut.*exclude_from_loading"):
        list(islice(loader, 400))
    loader.close()


@pytest.mark.parametrize(("name", "file"), [("text", "a.txt"), ("json", "a.jsonl")])
def test_an_older_position_in_files_with_a_byte_order_mark_is_refused(tmp_path: Path, name: str, file: str) -> None:
    content = b"text " * 100 if name == "text" else b'{"text": "' + b"text " * 100 + b'"}'
    (tmp_path / file).write_bytes(b"\xef\xbb\xbf" + content)
    loader = make_loader(tmp_path / file)
    loader.load_state_dict(as_before(loader.state_dict()))
    with pytest.raises(ConfigError, match="has a byte order mark"):
        next(loader)
    loader.close()


def _growth(warm: Path, files: list[Path]) -> int:
    """Return the growth of the peak of resident memory, in MiB, over the first batches of each file."""
    peaks = []
    for file in (warm, *files):
        loader = make_loader(file)
        list(islice(loader, 3))
        loader.close()
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peaks[-1] - peaks[0]) // 1024


def test_memory_does_not_grow_with_the_tokens_of_a_document(tmp_path: Path) -> None:
    """20 MB on one line: text takes a piece at a time, the others hold some copies of the record. It took 2.5 GiB."""
    warm = tmp_path / "warm.txt"
    warm.write_text(WORDS)
    files = [write(tmp_path, kind, (WORDS + " ") * 96) for kind in SOURCES]
    (grown,) = on_ranks(1, tmp_path / "process", {}, _growth, warm, files)
    assert grown < 300
