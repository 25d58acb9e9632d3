"""Damaged data files: each is read as far as it can be, or ends with one message; no other error, no hang."""

from __future__ import annotations

import gzip
import json
import random
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from titanlite.data import DataLoader, build_source, load_tokenizer
from titanlite.errors import ConfigError

TOKENIZER = load_tokenizer()


def whole_files(folder: Path) -> dict[str, bytes]:
    draw = random.Random(0)
    documents = [f"document {n} " + "some words é 中 " * draw.randint(1, 60) for n in range(120)]
    lines = "\n".join(json.dumps({"text": text, "number": n}) for n, text in enumerate(documents)).encode()
    text = "\n".join(documents).encode()
    files = {
        "a.jsonl": lines,
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": pyarrow.Codec("zstd").compress(lines, asbytes=True),
        "a.json": json.dumps([{"text": text} for text in documents]).encode(),
        "a.txt": text,
        "a.txt.gz": gzip.compress(text),
    }
    for codec in ("none", "snappy", "gzip", "zstd"):
        table = pyarrow.table({"text": documents, "number": range(120)})
        pyarrow.parquet.write_table(table, folder / "whole", compression=codec, row_group_size=50)
        files[f"{codec}.parquet"] = (folder / "whole").read_bytes()
    return files


def mutated(data: bytes, draw: random.Random) -> bytes:
    result, kind = bytearray(data), draw.choice(["flip", "cut", "insert", "repeat", "zero"])
    for _ in range(draw.choice([1, 1, 5, 50])):
        at = draw.randrange(len(result) + 1)
        if kind == "flip" and at < len(result):
            result[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del result[at : at + draw.randrange(1, 500)]
        elif kind == "insert":
            result[at:at] = draw.randbytes(draw.randrange(1, 50))
        elif kind == "repeat":
            result[at:at] = result[at : at + 300]
        elif kind == "zero":
            result[at : at + 20] = bytes(20)
    return bytes(result)


def refusal(file: Path, on_corrupt: str) -> str:
    """Return the message with which reading some epochs of the file ends; empty if it does not."""
    name = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}[file.suffixes[0]]
    sizes = {"seq_len": 64, "global_batch_size": 4, "local_batch_size": 4, "dp_rank": 0, "dp_degree": 1}
    loader = None
    try:
        loader = DataLoader(build_source(name, path=str(file), on_corrupt=on_corrupt, seed=0), TOKENIZER, **sizes)
        for batch in islice(loader, 150):
            assert int(batch.inputs.max()) < TOKENIZER.vocab_size
    except ConfigError as error:
        return str(error)
    finally:
        if loader is not None:
            loader.close()
    return ""


@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.long)])
def test_a_damaged_file_ends_with_one_message_or_is_read(tmp_path: Path, seed: int) -> None:
    files, draw = whole_files(tmp_path), random.Random(seed)
    messages = []
    for number in range(200 if seed else 40):
        name = draw.choice(list(files))
        file = tmp_path / f"{number}" / name
        file.parent.mkdir()
        file.write_bytes(files[name])
        assert not refusal(file, "stop")
        file.write_bytes(mutated(files[name], draw))
        messages.append(refusal(file, draw.choice(["stop", "skip"])))
        assert not messages[-1] or str(file) in messages[-1] or "training.seq_len" in messages[-1]
        assert len(messages[-1]) < 1000
    assert 0 < sum(map(bool, messages)) < len(messages)
