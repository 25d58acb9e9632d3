"""What is held out: by document, from every source, whatever the seed, the order and the number of shards."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from titanlite.data import START, DataLoader, PartOfSource, Source, build_source, is_held_out, load_tokenizer
from titanlite.errors import ConfigError

PERCENT = 10.0
TEXTS = [f"Document {n}: {' '.join(f'w{n}.{i}' for i in range(5 + n % 9))}" for n in range(200)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """The same documents as text, JSON lines and parquet."""
    for kind in ("text", "json", "parquet"):
        (tmp_path / kind).mkdir()
    for n, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{n}.txt").write_text(text)
    for part in range(2):
        half = TEXTS[part::2]
        (tmp_path / "json" / f"{part}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in half))
        Dataset.from_dict({"text": half}).to_parquet(str(tmp_path / "parquet" / f"{part}.parquet"))
    return tmp_path


def built(corpus: Path, name: str, seed: int = 0) -> Source:
    return build_source(name, path=None if name == "pystdlib" else str(corpus / name), seed=seed)


def texts(source: Source, num_shards: int = 1) -> list[str]:
    shards = (source.documents(shard, num_shards, 0, START) for shard in range(num_shards))
    return [text for _, text in itertools.chain(*shards)]


@pytest.mark.parametrize("name", ["pystdlib", "text", "json", "parquet"])
def test_every_document_is_on_exactly_one_side(corpus: Path, name: str) -> None:
    whole = built(corpus, name)
    training, held_out = (PartOfSource(whole, PERCENT, held_out=side) for side in (False, True))
    assert sorted(texts(training) + texts(held_out)) == sorted(texts(whole))
    assert set(texts(training)).isdisjoint(texts(held_out))
    assert 0.5 * PERCENT < 100 * len(texts(held_out)) / len(texts(whole)) < 1.7 * PERCENT
    # Other seeds and shards put the same ones there.
    again = PartOfSource(built(corpus, name, seed=5), PERCENT, held_out=True)
    assert sorted(texts(again, 3)) == sorted(texts(held_out))


def test_the_source_does_not_matter(corpus: Path) -> None:
    sides = [sorted(texts(PartOfSource(built(corpus, n), PERCENT, held_out=True))) for n in ("text", "json", "parquet")]
    assert sides[0] == sides[1] == sides[2]


@settings(max_examples=50, deadline=None)
@given(st.text(), st.floats(0.001, 99), st.floats(0.001, 99))
def test_a_larger_share_holds_what_a_smaller_one_does(text: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_held_out(text, large) >= is_held_out(text, small)


def test_the_share_is_what_was_asked_for() -> None:
    for percent in (0.5, 10.0, 60.0):
        held_out = sum(is_held_out(str(n), percent) for n in range(20_000))
        assert held_out == pytest.approx(200 * percent, rel=0.15)


def test_a_document_is_where_it_is_for_good() -> None:
    """A resumed run must find what an earlier version held out."""
    assert [n for n in range(60) if is_held_out(f"document {n}", 10.0)] == [40, 44, 59]


@pytest.mark.parametrize("name", ["text", "json", "parquet"])
def test_no_training_batch_has_held_out_text(corpus: Path, name: str) -> None:
    tokenizer = load_tokenizer()
    whole = built(corpus, name)
    loader = DataLoader(
        PartOfSource(whole, PERCENT, held_out=False),
        tokenizer,
        seq_len=32,
        global_batch_size=4,
        local_batch_size=4,
        dp_rank=0,
        dp_degree=1,
    )
    seen: dict[int, list[int]] = {slot: [] for slot in range(4)}
    while min(epoch for epoch, *_ in loader.state_dict()["shards"].values()) < 2:
        batch = next(loader)
        for slot, tokens in enumerate(batch.inputs.flatten(0, 1).tolist()):
            seen[slot] += tokens
    loader.close()
    trained_on = " ".join(tokenizer.decode(tokens) for tokens in seen.values())
    held_out = [text for text in TEXTS if is_held_out(text, PERCENT)]
    assert len(held_out) > 5
    assert not [text for text in held_out if text in trained_on]
    assert len([text for text in TEXTS if text in trained_on]) > 0.9 * (len(TEXTS) - len(held_out))


def test_reading_continues_from_a_position(corpus: Path) -> None:
    for name in ("json", "parquet"):
        part = PartOfSource(built(corpus, name), PERCENT, held_out=False)
        everything = list(part.documents(0, 2, 0, START))
        for position, _ in everything[:: len(everything) // 5]:
            rest = list(part.documents(0, 2, 0, position))
            assert rest == everything[-len(rest) :]
            assert rest[0][0] == position


def test_a_place_in_the_data_belongs_to_the_split(corpus: Path) -> None:
    tokenizer = load_tokenizer()
    sizes = {"seq_len": 16, "global_batch_size": 4, "local_batch_size": 4, "dp_rank": 0, "dp_degree": 1}
    whole = built(corpus, "json")
    with_split = DataLoader(PartOfSource(whole, 1.0, held_out=False), tokenizer, **sizes)
    without = DataLoader(whole, tokenizer, **sizes)
    with pytest.raises(ConfigError, match=r"held_out_percent was None, is 1\.0"):
        with_split.load_state_dict(without.state_dict())
    with pytest.raises(ConfigError, match=r"held_out_percent was 1\.0, is None"):
        without.load_state_dict(with_split.state_dict())


def test_shards_of_what_is_held_out_have_documents(corpus: Path) -> None:
    whole = built(corpus, "json")  # of 200 documents
    assert whole.num_shards(8) == 8
    assert PartOfSource(whole, 1.0, held_out=False).num_shards(8) == 8
    assert [PartOfSource(whole, percent, held_out=True).num_shards(8) for percent in (1.0, 20.0, 70.0)] == [1, 2, 8]
    parquet = built(corpus, "parquet")  # two files
    assert PartOfSource(parquet, 1.0, held_out=True).num_shards(8) == 2
    assert PartOfSource(parquet, 1.0, held_out=True).num_shards(7) == 1


def test_the_files_of_a_source(corpus: Path) -> None:
    for name, count in {"text": 200, "json": 2, "parquet": 2}.items():
        source = built(corpus, name)
        assert len(source.files) == count
        assert PartOfSource(source, PERCENT, held_out=False).files == source.files
    assert all(file.suffix == ".py" for file in built(corpus, "pystdlib").files)


def test_a_corrupt_document_is_counted_once_by_the_source(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 3 + "broken\n")
    source = build_source("json", path=str(tmp_path), on_corrupt="skip", seed=0)
    part = PartOfSource(source, 50.0, held_out=is_held_out("good", 50.0))
    assert len(texts(part)) == part.kept == part.read == 3
    assert source.skipped == 1
