"""The loader: the same global batches on any number of processes, no token lost, exact resume."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.support.forks import ROOT
from titanlite.data import START, DataLoader, Source, build_source, load_tokenizer, merge_states
from titanlite.errors import ConfigError

SEQ_LEN = 16
TOKENIZER = load_tokenizer()


def make_loader(source: Source, **changes: Any) -> DataLoader:
    arguments = {
        "seq_len": SEQ_LEN,
        "global_batch_size": 8,
        "local_batch_size": 8,
        "dp_rank": 0,
        "dp_degree": 1,
    }
    return DataLoader(source, TOKENIZER, **(arguments | changes))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """140 documents of 2 to 13 words, so that 8 shards have about 17 each: an epoch of some 40 steps of 8 x 16."""
    lines = [json.dumps({"text": " ".join(f"w{n}.{i}" for i in range(2 + n * 7 % 12))}) for n in range(140)]
    file = tmp_path / "corpus.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def global_batches(loaders: list[DataLoader], steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The (inputs, labels) [global_batch_size, seq_len] of each step, ranks put together in order."""
    result = []
    for _ in range(steps):
        batches = [next(loader) for loader in loaders]
        inputs = torch.cat([batch.inputs.flatten(0, 1) for batch in batches])
        labels = torch.cat([batch.labels.flatten(0, 1) for batch in batches])
        result.append((inputs, labels))
    return result


def world(file: Path, degree: int, local: int, **changes: Any) -> list[DataLoader]:
    changes = {"local_batch_size": local, "dp_degree": degree, **changes}
    return [make_loader(build_source("json", path=str(file), seed=7), dp_rank=r, **changes) for r in range(degree)]


def assert_same(one: list[tuple[torch.Tensor, torch.Tensor]], other: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    assert len(one) == len(other)
    for (inputs, labels), (other_inputs, other_labels) in zip(one, other):
        assert torch.equal(inputs, other_inputs)
        assert torch.equal(labels, other_labels)


def close(loaders: list[DataLoader]) -> None:
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize(("degree", "local"), [(1, 1), (1, 4), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)])
def test_global_batches_do_not_depend_on_ranks_or_local_batch(corpus: Path, degree: int, local: int) -> None:
    reference, loaders = world(corpus, 1, 8), world(corpus, degree, local)
    assert_same(global_batches(loaders, 20), global_batches(reference, 20))
    close([*reference, *loaders])


def test_ranks_may_share_shards(tmp_path: Path) -> None:
    """A corpus with too few documents for a shard per slot."""
    file = tmp_path / "one.txt"
    file.write_text("\n".join(f"line {n}" for n in range(200)))
    source = build_source("text", path=str(file), seed=0)
    assert source.identity["documents"] == 1
    one = [make_loader(source)]
    four = [make_loader(source, local_batch_size=2, dp_rank=r, dp_degree=4) for r in range(4)]
    states = [loader.state_dict() for loader in four]
    assert all(list(state["shards"]) == ["0"] for state in states)
    assert_same(global_batches(four, 20), global_batches(one, 20))
    states = [loader.state_dict() for loader in four]
    assert all(state == states[0] for state in states)
    assert one[0].state_dict() == states[0]
    close([*one, *four])


def test_shapes_types_and_shift(corpus: Path) -> None:
    loader = world(corpus, 1, 2)[0]
    batch = next(loader)
    assert batch.inputs.shape == batch.labels.shape == (4, 2, SEQ_LEN)
    assert batch.inputs.dtype == batch.labels.dtype == torch.int64
    assert batch.inputs.is_contiguous()
    assert batch.labels.is_contiguous()
    assert torch.equal(batch.inputs[..., 1:], batch.labels[..., :-1])
    assert batch.inputs[0, 0, 0] == TOKENIZER.bos_id
    loader.close()


def expected_stream(source: Source, shard: int, num_shards: int, length: int) -> list[int]:
    tokens: list[int] = []
    epoch = 0
    while len(tokens) < length:
        for _, text in source.documents(shard, num_shards, epoch, START):
            tokens += [TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id]
        epoch += 1
    return tokens[:length]


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=40), min_size=1, max_size=70),
    seq_len=st.integers(1, 12),
    batch=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 2**32),
)
def test_no_token_is_lost_or_repeated(texts: list[str], seq_len: int, batch: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate(texts):
            Path(folder, f"{number:03}.txt").write_bytes(text.encode())
        source = build_source("text", path=folder, seed=seed)
        shards = source.num_shards(batch)
        dealt = [[text for _, text in source.documents(shard, shards, 0, START)] for shard in range(shards)]
        assert Counter(text for part in dealt for text in part) == Counter(texts)
        assume(all(sum(len(TOKENIZER.encode(t)) + 2 for t in part) > seq_len for part in dealt))

        steps = 6
        loader = make_loader(source, seq_len=seq_len, global_batch_size=batch, local_batch_size=batch)
        inputs, labels = (torch.stack(parts) for parts in zip(*global_batches([loader], steps)))
        loader.close()
        per_shard = steps * batch // shards * seq_len
        for shard in range(shards):
            stream = expected_stream(source, shard, shards, per_shard + 1)
            assert inputs[:, shard::shards].flatten().tolist() == stream[:-1]
            assert labels[:, shard::shards].flatten().tolist() == stream[1:]


@pytest.mark.parametrize("degree", [1, 2, 8])
@pytest.mark.parametrize("steps_before", [0, 1, 13, 39, 40, 41, 42, 43, 90])
def test_resume_equals_undisturbed(corpus: Path, steps_before: int, degree: int) -> None:
    """Saved on 2 ranks, continued on 1, 2 or 8; the range covers ends of the first and second epochs."""
    undisturbed, saved, resumed = world(corpus, 1, 8), world(corpus, 2, 2), world(corpus, degree, 1)
    expected = global_batches(undisturbed, steps_before + 6)
    global_batches(saved, steps_before)
    state = merge_states([loader.state_dict() for loader in saved])
    state = json.loads(json.dumps(state))
    assert state["step"] == steps_before
    for loader in resumed:
        loader.load_state_dict(state)
        assert loader.state_dict()["step"] == steps_before
    assert_same(global_batches(resumed, 6), expected[steps_before:])
    assert merge_states([loader.state_dict() for loader in resumed]) == undisturbed[0].state_dict()
    close([*undisturbed, *saved, *resumed])


def test_resume_steps_cover_an_epoch_border(corpus: Path) -> None:
    """What the parameters of the test above rely on."""
    loader = world(corpus, 1, 8)[0]
    epochs = []
    for _ in range(90):
        next(loader)
        epochs.append({place[0] for place in loader.state_dict()["shards"].values()})
    loader.close()
    assert epochs[12] == {0}
    assert max(epochs[89]) >= 2
    assert any(len(epochs[step - 1]) == 2 for step in (39, 40, 41, 42, 43))


def test_epochs_differ_in_order_and_not_in_documents(corpus: Path) -> None:
    source = build_source("json", path=str(corpus), seed=7)
    first, second = ([text for _, text in source.documents(3, 8, epoch, START)] for epoch in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_loading_into_a_started_loader_starts_over(corpus: Path) -> None:
    loader = world(corpus, 1, 8)[0]
    state = loader.state_dict()
    expected = global_batches([loader], 3)
    loader.load_state_dict(state)
    assert_same(global_batches([loader], 3), expected)
    loader.close()


def test_state_counts_batches_handed_out_not_prefetched(corpus: Path) -> None:
    eager, lazy = world(corpus, 1, 8, prefetch=30)[0], world(corpus, 1, 8, prefetch=1)[0]
    next(eager), next(lazy)
    deadline = time.monotonic() + 10
    while eager._prefetcher._queue.qsize() < 30 and time.monotonic() < deadline:  # type: ignore[union-attr]
        time.sleep(0.01)
    assert eager._prefetcher._queue.qsize() == 30  # type: ignore[union-attr]
    assert eager.state_dict() == lazy.state_dict()
    assert eager.state_dict()["step"] == 1
    close([eager, lazy])


def data_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "titanlite-data"]


def test_close_ends_the_thread_promptly(corpus: Path) -> None:
    before = len(data_threads())
    loader = world(corpus, 1, 8)[0]
    next(loader)
    assert len(data_threads()) == before + 1
    begin = time.monotonic()
    loader.close()
    assert time.monotonic() - begin < 2
    assert len(data_threads()) == before
    assert loader.state_dict()["step"] == 1
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_process_that_does_not_close_ends_with_its_own_status() -> None:
    script = (
        "from titanlite.data import *\n"
        "loader = DataLoader(build_source('pystdlib', seed=0), load_tokenizer(), seq_len=256, global_batch_size=8,\n"
        "                    local_batch_size=8, dp_rank=0, dp_degree=1, prefetch=50)\n"
        "next(loader)\n"
        "raise SystemExit(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (5, "")


def test_errors_of_the_thread_are_raised_by_next(corpus: Path) -> None:
    corpus.write_text(corpus.read_text() + '{"text": 5}\n')
    loader = world(corpus, 1, 8)[0]
    for _ in range(2):
        with pytest.raises(ConfigError, match=r'corpus\.jsonl, line 141: the field "text" is not a string'):
            global_batches([loader], 60)
    loader.close()


def test_shard_with_less_than_a_sequence(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too short")
    source = build_source("text", path=str(tmp_path), seed=0)
    tokens = len(TOKENIZER.encode("too short")) + 2
    loader = make_loader(source, seq_len=tokens, global_batch_size=1, local_batch_size=1)
    message = rf"training.seq_len = {tokens}: .* need {tokens + 1} tokens, and data shard 0 of 1 has only {tokens} in"
    with pytest.raises(ConfigError, match=message):
        next(loader)
    loader.close()
    loader = make_loader(source, seq_len=tokens - 1, global_batch_size=1, local_batch_size=1)
    assert next(loader).inputs.shape == (1, 1, tokens - 1)
    loader.close()


def test_a_corpus_of_corrupt_documents_ends_with_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("nothing\n" * 3)
    loader = make_loader(build_source("json", path=str(tmp_path), on_corrupt="skip", seed=0))
    with pytest.raises(ConfigError, match="has only 0 in a whole epoch"):
        next(loader)
    loader.close()


@pytest.mark.parametrize("documents", [300, 40])
def test_documents_left_out_are_counted_over_ranks_and_resumes(tmp_path: Path, documents: int) -> None:
    """With a shard per slot, and with few shards that ranks share; over the end of an epoch."""
    lines = [json.dumps({"text": f"text {n} " * 5}) if n % 4 else '{"text": 5}' for n in range(documents)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def made(degree: int) -> list[DataLoader]:
        sizes = {"local_batch_size": 1, "dp_degree": degree}
        sources = (build_source("json", path=str(tmp_path), on_corrupt="skip", seed=7) for _ in range(degree))
        return [make_loader(source, dp_rank=rank, **sizes) for rank, source in enumerate(sources)]

    one, four, resumed = made(1), made(4), made(2)
    for step in range(60):
        next(one[0])
        for loader in four:
            next(loader)
        assert sum(loader.skipped for loader in four) == one[0].skipped
        if step == 30:
            state = merge_states([loader.state_dict() for loader in four])
            for loader in resumed:
                loader.load_state_dict(json.loads(json.dumps(state)))
        if step > 30:
            for loader in resumed:
                next(loader)
            assert sum(loader.skipped for loader in resumed) == one[0].skipped
    epochs = [place[0] for place in one[0].state_dict()["shards"].values()]
    assert one[0].skipped >= min(epochs) * documents // 4
    assert documents == 300 or min(epochs) > 1
    close([*one, *four, *resumed])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 10, "local_batch_size": 4, "dp_degree": 2},
            r"training.global_batch_size = 10: .* = 4 x 2 = 8; use 8 or 16",
        ),
        ({"global_batch_size": 3, "local_batch_size": 4}, r"= 4 x 1 = 4; use 4$"),
        ({"seq_len": 0}, "training.seq_len = 0: must be at least 1"),
        ({"local_batch_size": 0}, "training.local_batch_size = 0"),
        ({"global_batch_size": -1}, "training.global_batch_size = -1"),
    ],
)
def test_sizes_that_do_not_divide(corpus: Path, changes: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_loader(build_source("json", path=str(corpus), seed=0), **changes)


def test_state_of_another_run_is_refused(corpus: Path) -> None:
    state = world(corpus, 1, 8)[0].state_dict()
    with pytest.raises(ConfigError, match="seq_len was 16, is 8"):
        world(corpus, 1, 8, seq_len=8)[0].load_state_dict(state)
    with pytest.raises(ConfigError, match=r"global_batch_size was 8, is 16.*exclude_from_loading"):
        world(corpus, 1, 8, global_batch_size=16)[0].load_state_dict(state)
    for changes, fix in (
        ({"global_batch_size": 16, "local_batch_size": 4}, "--training.global_batch_size=8, or"),
        (
            {"global_batch_size": 16, "local_batch_size": 8, "dp_degree": 2},
            "--training.global_batch_size=8 --training.local_batch_size=4, or",
        ),
        ({"global_batch_size": 12, "local_batch_size": 4, "dp_degree": 3}, "processes that divides 8, or"),
    ):
        with pytest.raises(ConfigError, match=fix) as caught:
            make_loader(build_source("json", path=str(corpus), seed=7), **changes).load_state_dict(state)
        assert (caught.value.key, caught.value.value) == ("training.global_batch_size", changes["global_batch_size"])
    with pytest.raises(ConfigError, match="seed was 7, is 8"):
        make_loader(build_source("json", path=str(corpus), seed=8)).load_state_dict(state)
    corpus.write_text(corpus.read_text() + '{"text": "new"}\n')
    with pytest.raises(ConfigError, match="number of documents was 140, is 141"):
        world(corpus, 1, 8)[0].load_state_dict(state)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_state_of_other_content_is_refused(tmp_path: Path, suffix: str) -> None:
    """Files of the same number and with as many documents; a state of before these checks is taken as it is."""

    def loader(folder: Path, field: str = "text") -> DataLoader:
        return make_loader(build_source("json", path=str(folder), text_field=field, seed=0))

    def write(folder: Path, words: str) -> Path:
        opened = gzip.open if suffix.endswith(".gz") else open
        folder.mkdir()
        for name in ("a", "b"):
            with opened(folder / (name + suffix), "wt") as file:
                for i in range(40):
                    file.write(json.dumps({"text": f"{words} {i} " * 20, "other": "no " * 50}) + "\n")
        return folder

    one, same, other = write(tmp_path / "one", "some"), write(tmp_path / "same", "some"), write(tmp_path / "x", "more")
    state = loader(one).state_dict()
    if suffix == ".jsonl":  # a gzip file holds its name and time
        loader(same).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"the content of the files .* was .*, is .*exclude_from_loading"):
        loader(other).load_state_dict(state)
    with pytest.raises(ConfigError, match="text_field was text, is other") as caught:
        loader(one, "other").load_state_dict(state)
    assert (caught.value.key, caught.value.value) == ("data.text_field", "other")
    before = {key: entry for key, entry in state["identity"].items() if key not in ("content", "text_field")}
    loader(one).load_state_dict({**state, "identity": before})


def test_state_of_one_rank_alone_is_refused(corpus: Path) -> None:
    two = world(corpus, 2, 4)
    with pytest.raises(ValueError, match=r"lacks the data shards \[4, 5, 6, 7\]"):
        two[1].load_state_dict(two[0].state_dict())
    next(two[0])
    with pytest.raises(ValueError, match="different steps"):
        merge_states([loader.state_dict() for loader in two])
    close(two)


def test_default_source_trains_the_debug_model_shape() -> None:
    loader = make_loader(build_source("pystdlib", seed=0), seq_len=256)
    tokens = next(loader).inputs
    assert tokens.shape == (1, 8, 256)
    assert int(tokens.max()) < TOKENIZER.vocab_size
    loader.close()
