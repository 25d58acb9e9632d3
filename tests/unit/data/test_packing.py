"""Documents in sequences: where they begin, what is scored, whole examples by best fit, and exact resume."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titanlite.data import Batch, DataLoader, Packing, build_source, load_tokenizer, merge_states
from titanlite.data.best_fit import ExamplePacker
from titanlite.data.document_stream import BEGINNING, DocumentStream
from titanlite.data.examples import Encoder, Example
from titanlite.data.packing import NOT_SCORED, fill
from titanlite.data.records import Corrupt
from titanlite.errors import ConfigError

TOKENIZER = load_tokenizer()
SEQ_LEN = 96


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 documents of 4 to about 130 tokens."""
    rng = random.Random(0)
    texts = (f"text {i} " + " ".join(str(rng.randrange(1000)) for _ in range(rng.randrange(45))) for i in range(300))
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def loader(corpus: Path, packing: Packing, rank: int = 0, degree: int = 1, **changes: Any) -> DataLoader:
    arguments = {"seq_len": SEQ_LEN, "global_batch_size": 8, "local_batch_size": 4, **changes}
    source = build_source("json", path=str(corpus), seed=0)
    return DataLoader(source, TOKENIZER, dp_rank=rank, dp_degree=degree, packing=packing, **arguments)


def sequences(batch: Batch) -> list[tuple[list[int], list[int], list[int]]]:
    assert batch.starts is not None
    flat = (tensor.flatten(0, 1).tolist() for tensor in (batch.inputs, batch.labels, batch.starts))
    return list(zip(*flat, strict=True))


def documents(corpus: Path) -> set[tuple[int, ...]]:
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    return {(TOKENIZER.bos_id, *ids.tolist(), TOKENIZER.eos_id) for ids in TOKENIZER.encode_batch(texts)}


def parts(inputs: list[int], labels: list[int], starts: list[int]) -> list[tuple[int, ...]]:
    """The tokens of the documents of a sequence: the inputs of each and its last label."""
    begins = [i for i, start in enumerate(starts) if i == start]
    assert all(start == max(b for b in begins if b <= i) for i, start in enumerate(starts))
    cut = [(inputs[a:b], labels[a:b]) for a, b in itertools.pairwise([*begins, len(starts)])]
    return [(*tokens, targets[-1]) for tokens, targets in cut]


def test_a_masked_stream_has_the_tokens_of_the_stream(corpus: Path) -> None:
    """With masks, the first token of a document is no label, and every document begins with BOS, but the first of a
    sequence, which can be the rest of one."""
    plain, masked = loader(corpus, Packing()), loader(corpus, Packing(document_mask=True))
    for _ in range(10):
        one, other = next(plain), next(masked)
        assert one.starts is None
        assert torch.equal(one.inputs, other.inputs)
        begins = other.labels == NOT_SCORED
        assert torch.equal(one.labels[~begins], other.labels[~begins])
        assert (one.labels[begins] == TOKENIZER.bos_id).all()
        for inputs, labels, starts in sequences(other):
            for i, start in enumerate(starts):
                assert i == start == 0 or (inputs[i] == TOKENIZER.bos_id) == (i == start)
                assert labels[i] == (NOT_SCORED if i + 1 < SEQ_LEN and starts[i + 1] == i + 1 else labels[i])


def test_every_example_is_whole_and_used_once_per_epoch(corpus: Path) -> None:
    data = loader(corpus, Packing("examples", too_long="drop"), global_batch_size=1, local_batch_size=1)  # one shard
    expected = {d for d in documents(corpus) if len(d) <= SEQ_LEN + 1}
    seen: list[tuple[int, ...]] = []
    unscored = 0
    while len(seen) < len(expected):
        for inputs, labels, starts in sequences(next(data)):
            *complete, last = parts(inputs, labels, starts)
            padded = last[-1] == NOT_SCORED
            assert not padded or {*last[:-1]} == {TOKENIZER.eos_id}
            inside = (i for i in range(SEQ_LEN - 1) if starts[i + 1] != i + 1 and labels[i] != NOT_SCORED)
            assert all(labels[i] == inputs[i + 1] for i in inside)
            seen += complete if padded else [*complete, last]
            unscored += labels.count(NOT_SCORED)
    data.close()
    assert {*seen} <= expected
    assert len({*seen}) == len(expected)  # but for two with the same text, none is used twice
    assert unscored < 0.15 * len(seen) * np.mean([len(d) for d in seen])


def test_one_example_per_sequence(corpus: Path) -> None:
    whole = {d[: SEQ_LEN + 1] for d in documents(corpus)}
    data = loader(corpus, Packing("none"))
    rows = [row for _ in range(8) for row in sequences(next(data))]
    assert {parts(*row)[0] for row in rows} <= whole
    assert len({parts(*row)[0] for row in rows}) == len(rows)
    assert data.truncated > 0 == data.skipped


@pytest.mark.parametrize("kind", ["stream", "examples", "none"])
@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_batches_are_those_of_one_process_and_of_an_undisturbed_run(corpus: Path, kind: str, too_long: str) -> None:
    packing = Packing(kind, document_mask=True, too_long=too_long)
    two = [loader(corpus, packing, rank, 2) for rank in range(2)]
    resumed = loader(corpus, packing)
    for step in range(45):  # more than an epoch
        shares, whole = [next(data) for data in two], next(resumed)
        assert sequences(whole) == [row for share in shares for row in sequences(share)]
        assert resumed.skipped == sum(data.skipped for data in two)
        assert resumed.truncated == sum(data.truncated for data in two)
        if step in (0, 1, 7, 23):
            state = json.loads(json.dumps(merge_states([data.state_dict() for data in two])))
            resumed.close()
            resumed = loader(corpus, packing)
            resumed.load_state_dict(state)
    for data in (*two, resumed):
        data.close()


def test_a_place_of_another_packing_is_refused(corpus: Path) -> None:
    state = loader(corpus, Packing("examples")).state_dict()
    with pytest.raises(ConfigError, match="packing was examples, is None"):
        loader(corpus, Packing()).load_state_dict(state)
    with pytest.raises(ConfigError, match="too_long was truncate, is drop"):
        loader(corpus, Packing("examples", too_long="drop")).load_state_dict(state)


def test_too_long_is_an_error_with_its_place(corpus: Path) -> None:
    data = loader(corpus, Packing("examples", too_long="error"))
    message = r"a\.jsonl, line \d+: it has \d+ tokens, and a sequence 96; .*too_long"
    with pytest.raises(ConfigError, match=message):
        list(itertools.islice(data, 20))


class Answers(Encoder):
    """Scores what follows the first 30 tokens; a text with the number 7 at its end cannot be used."""

    identity: dict[str, str | int] = {"prompt": 30}  # noqa: RUF012
    fields = ()

    def encode(self, record: Any) -> Example:
        if record.endswith("7"):
            raise Corrupt("it ends with 7", "seven")
        tokens = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(record), TOKENIZER.eos_id], dtype=np.int32)
        return Example(tokens, np.arange(len(tokens)) >= 30)


@pytest.mark.parametrize("kind", ["stream", "examples"])
def test_only_what_is_scored_is_a_label(corpus: Path, kind: str) -> None:
    """Examples without a scored token, and those that cannot be used, are left out and counted; resume is exact."""

    def made() -> DataLoader:
        source = build_source("json", path=str(corpus), on_corrupt="skip", seed=0)
        sizes = {"seq_len": SEQ_LEN, "global_batch_size": 4, "local_batch_size": 4, "dp_rank": 0, "dp_degree": 1}
        return DataLoader(source, TOKENIZER, encoder=Answers(), packing=Packing(kind, document_mask=True), **sizes)

    data, resumed = made(), made()
    for step in range(25):
        batch = next(data)
        assert sequences(batch) == sequences(next(resumed))
        assert data.skipped == resumed.skipped
        for inputs, labels, starts in sequences(batch):
            for i, (start, label) in enumerate(zip(starts, labels, strict=True)):
                if start > 0 and i - start < 29:
                    assert label == NOT_SCORED
                if i + 1 < SEQ_LEN and starts[i + 1] != i + 1 and label != NOT_SCORED:
                    assert label == inputs[i + 1]
        assert (batch.labels != NOT_SCORED).any()
        if step % 9 == 4:
            state = json.loads(json.dumps(data.state_dict()))
            resumed.close()
            resumed = made()
            resumed.load_state_dict(state)
    assert data.skipped > 10
    source = build_source("json", path=str(corpus), seed=0)
    stops = DataLoader(source, TOKENIZER, encoder=Answers(), seq_len=SEQ_LEN, global_batch_size=4, local_batch_size=4,
                       dp_rank=0, dp_degree=1, packing=Packing(kind))  # fmt: skip
    with pytest.raises(ConfigError, match=r"a\.jsonl, line \d+: it ends with 7; .*on_corrupt"):
        next(stops)


def test_no_usable_example_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "the number 7"}\n' * 40)
    source = build_source("json", path=str(path), on_corrupt="skip", seed=0)
    stream = DocumentStream(source, 0, 1, SEQ_LEN, BEGINNING)
    packer = ExamplePacker(stream, SEQ_LEN, padding=0, single=False, too_long="drop")
    with pytest.raises(ConfigError, match="no example in a whole epoch"):
        fill([packer], Answers(), 1)
