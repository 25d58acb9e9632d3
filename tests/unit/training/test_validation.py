"""Validation on one process: its numbers, its data, what it leaves alone, and what it refuses."""

from __future__ import annotations

import functools
import gc
import hashlib
import itertools
import json
import logging
import math
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor
from torch.distributed.tensor import DTensor

from tests.support.runs import TINY
from titanlite import train
from titanlite.compare.comparison import compare
from titanlite.config import JobConfig, check_config, load_config
from titanlite.data import START, Batch, is_held_out, load_tokenizer
from titanlite.distributed import runtime
from titanlite.distributed.compile import CompileWatch
from titanlite.errors import ConfigError, TrainingError
from titanlite.launch.stop_request import STOP_SIGNALS
from titanlite.metrics.report import summary
from titanlite.models.layers import Decoder
from titanlite.optim.loss import IGNORED
from titanlite.train import Trainer
from titanlite.training.validate import _count

SEQ_LEN, BATCH = TINY["training.seq_len"], TINY["training.local_batch_size"]
FLOAT32 = {"training.mixed_precision_param": "float32"}
FLOAT8 = {"model.converters": "float8"}
DELAYED = {**FLOAT8, **{f"float8.scaling_type_{o}": "delayed" for o in ("input", "weight", "grad_output")}}


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """One group and one mesh for all trainers of this file: each group has threads of its own."""
    with pytest.MonkeyPatch.context() as patch:
        started = functools.cache(functools.partial(runtime.start_runtime, JobConfig().comm))
        patch.setattr(runtime, "start_runtime", lambda comm: started())
        patch.setattr(train, "build_mesh", functools.cache(train.build_mesh))
        yield
    dist.destroy_process_group()


@pytest.fixture
def trainer(one_process: None, tmp_path: Path) -> Iterator[Callable[..., Trainer]]:
    """Builds trainers that validate, from options on top of the tiny ones."""
    made: list[Trainer] = []
    numbers = itertools.count()
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def make(**options: Any) -> Trainer:
        given = {**TINY, "job.dump_folder": tmp_path / f"run{next(numbers)}", "validation.enable": "true", **options}
        made.append(Trainer(load_config([f"--{key}={value}" for key, value in given.items()])))
        root.handlers[:] = handlers  # the trainer's own hide what is logged from caplog
        return made[-1]

    yield make
    for each in made:
        each.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "validation.txt"
    file.write_text("".join(f"{n} squared is {n * n}, which is no news.\n" for n in range(150)))
    return file


def rows(trainer: Trainer, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (trainer.run_path / name).read_text().splitlines()]


def parameters(trainer: Trainer) -> dict[str, Tensor]:
    """And the buffers of delayed scaling."""
    state = trainer.model_parts[0].state_dict()
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in state.items()}


def advance(trainer: Trainer, steps: int) -> None:
    for _ in range(steps):
        trainer.advance()


def test_loss_and_bits_per_byte_written_out(trainer: Any, text: Path) -> None:
    run = trainer(
        **FLOAT32,
        **{"validation.dataset": "text", "validation.dataset_path": text, "validation.steps": 2, "training.steps": 1},
    )
    run.advance()
    (row,) = rows(run, "validation.jsonl")

    tokenizer = load_tokenizer()
    document = text.read_text()
    tokens = torch.tensor([tokenizer.bos_id, *tokenizer.encode(document), tokenizer.eos_id])
    count = 2 * BATCH * SEQ_LEN
    inputs, labels = tokens[:count].view(-1, SEQ_LEN), tokens[1 : count + 1].view(-1, SEQ_LEN)
    args = run.spec.configure(run.shape.flavor, tokenizer.vocab_size, SEQ_LEN)
    model = Decoder(args).double()
    model.load_state_dict(parameters(run))
    model.rope.copy_(run.model_parts[0].rope)
    log_likelihood = model(inputs).log_softmax(-1).gather(-1, labels[..., None])
    nats = -log_likelihood.sum().item()
    nbytes = len(tokenizer.decode(labels.flatten().tolist()).encode())
    assert document.encode().startswith(tokenizer.decode(labels.flatten().tolist()).encode())  # it is ASCII
    assert row["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / nbytes, rel=1e-5)
    assert (row["step"], row["tokens"]) == (1, count)
    assert row["time_s"] > 0


def test_only_labels_that_are_scored_count(trainer: Any) -> None:
    run = trainer()
    labels = torch.tensor([[[IGNORED, 65, 66, IGNORED]]])
    tokens, nbytes = _count([Batch(labels, labels)], run.tokenizer, run.mesh, run.runtime)
    assert (tokens, nbytes) == (2, int(run.tokenizer.token_bytes[[65, 66]].sum()))


def test_when_and_where_it_is_written(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    run = trainer(**{"training.steps": 5, "validation.interval": 2, "validation.steps": 1, "metrics.log_freq": 5})
    with caplog.at_level(logging.INFO):
        run.train()
    validated = rows(run, "validation.jsonl")
    assert [row["step"] for row in validated] == [2, 4, 5]
    assert [row["step"] for row in rows(run, "metrics.jsonl")] == [1, 5]
    assert set(rows(run, "metrics.jsonl")[0]).isdisjoint({"bits_per_byte"})
    last = f"loss {validated[-1]['loss']:.4f}, {validated[-1]['bits_per_byte']:.4f} bits per byte at step 5"
    assert f"validation             {last}" in caplog.text
    assert "every 2 steps, 1 x 4 sequences of 32 tokens: 1.0% of the documents of pystdlib, held out" in caplog.text
    assert f"validate step:  4  loss:  {validated[1]['loss']:.4f}  bits per byte: " in caplog.text


@pytest.mark.slow
def test_its_time_is_not_training_s(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(**{"training.steps": 4, "validation.interval": 1, "metrics.log_freq": 4, "validation.steps": 1})
    loss = run.validator.loss
    monkeypatch.setattr(run.validator, "loss", lambda asked_to_stop: (time.sleep(1), loss(asked_to_stop))[1])
    run.recorder.restart()
    start = time.perf_counter()
    advance(run, 4)
    elapsed = time.perf_counter() - start
    windows = rows(run, "metrics.jsonl")
    in_training = windows[0]["step_time_s"] + 3 * windows[1]["step_time_s"]
    assert in_training < elapsed - 3  # the validation of the last step comes after its row
    assert all(row["time_s"] > 1 for row in rows(run, "validation.jsonl"))


def digest(trainer: Trainer) -> str:
    tensors = parameters(trainer)
    state = [s[k] for s in trainer.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    parts = [*tensors.values(), *(s.full_tensor() for s in state)]
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in parts)).hexdigest()


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, DELAYED, {"activation_checkpoint.mode": "full"}], ids=["", "delayed", "full"])
def test_training_is_the_same_to_the_bit(trainer: Any, text: Path, task: Path, options: dict[str, Any]) -> None:
    apart = {"validation.dataset": "text", "validation.dataset_path": text, "validation.tasks": task}
    apart["validation.interval"] = 1
    common = {**options, "training.steps": 3}
    on, off = trainer(**common, **apart), trainer(**common, **{"validation.enable": "false"})
    for run in (on, off):
        advance(run, 3)
    keys = ("loss", "grad_norm", "tokens_seen")
    assert [[row[k] for k in keys] for row in rows(on, "metrics.jsonl")] == [
        [row[k] for k in keys] for row in rows(off, "metrics.jsonl")
    ]
    assert digest(on) == digest(off)
    assert not (off.run_path / "validation.jsonl").exists()


def test_delayed_scaling_and_the_modes_stay_as_they_are(trainer: Any) -> None:
    run = trainer(**DELAYED, **{"training.steps": 5, "validation.interval": 5})
    advance(run, 2)
    (model,) = run.model_parts
    model.layers["0"].eval()  # whoever did this
    run.train_step()
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers() if "fp8" in name}
    modes = [module.training for module in model.modules()]
    assert len(buffers) > 100
    assert len({*modes}) == 2
    first = run.validator.loss()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers() if "fp8" in name)
    assert [module.training for module in model.modules()] == modes
    assert run.validator.loss() == first


def test_every_validation_reads_the_same_with_any_seed(trainer: Any) -> None:
    one, other = (trainer(**{"training.seed": seed, "validation.steps": 2}).validator.data for seed in (0, 1))
    assert len(one.batches) == 2
    for a, b in zip(one.batches, other.batches, strict=True):
        assert torch.equal(a.inputs, b.inputs)
        assert torch.equal(a.labels, b.labels)


def json_lines(file: Path, documents: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return file


def documents(count: int, length: int = 30) -> list[str]:
    return [f"{n}. " + " ".join(f"w{n}.{i}" for i in range(length)) for n in range(count)]


def test_no_held_out_document_is_trained_on(trainer: Any, tmp_path: Path) -> None:
    corpus = documents(120)
    file = json_lines(tmp_path / "corpus.jsonl", corpus)
    run = trainer(
        **{"training.dataset": "json", "training.dataset_path": file, "validation.held_out_percent": 20},
        **{"validation.steps": 3},
    )
    decode = run.tokenizer.decode
    validated = decode(torch.cat([b.inputs.flatten() for b in run.validator.data.batches]).tolist())
    trained: dict[int, list[int]] = {}
    while min(epoch for epoch, *_ in run.loader.state_dict()["shards"].values()) < 1:
        for slot, tokens in enumerate(next(run.loader).inputs.flatten(0, 1).tolist()):
            trained.setdefault(slot, []).extend(tokens)
    read = " ".join(map(decode, trained.values()))
    held_out = [document for document in corpus if is_held_out(document, 20)]
    assert not [document for document in held_out if document in read]
    assert len([document for document in corpus if document in read]) > 0.8 * (len(corpus) - len(held_out))
    seen = [document for document in corpus if document in validated]
    assert seen
    assert {*seen} <= {*held_out}


def test_the_training_data_by_name_are_the_training_data(trainer: Any, tmp_path: Path) -> None:
    file = json_lines(tmp_path / "corpus.jsonl", documents(120))
    common = {"training.dataset": "json", "training.dataset_path": file, "validation.held_out_percent": 20}
    named = {"validation.dataset": "json", "validation.dataset_path": file}
    plain, by_name = trainer(**common), trainer(**common, **named)
    assert by_name.loader.identity == plain.loader.identity
    assert by_name.loader.identity["held_out_percent"] == "20.0"
    assert torch.equal(by_name.validator.data.batches[0].inputs, plain.validator.data.batches[0].inputs)


@pytest.mark.slow
def test_the_run_folder_tells_which_text_is_read(trainer: Any, text: Path, tmp_path: Path) -> None:
    """By its content: a copy elsewhere is the same data, and an edited file under the same path is another one."""
    corpus, copy = json_lines(tmp_path / "corpus.jsonl", documents(40)), tmp_path / "copy.jsonl"
    shutil.copy(corpus, copy)

    def run(file: Path) -> Path:
        data = {"training.dataset": "json", "training.dataset_path": file, "training.steps": 3}
        validation = {"validation.dataset": "text", "validation.dataset_path": text, "validation.interval": 1}
        done = trainer(**data, **validation, **{"metrics.log_freq": 1})
        advance(done, 3)
        return Path(done.run_path)

    first, elsewhere = run(corpus), run(copy)
    json_lines(corpus, documents(41))
    text.write_text("other text for validation\n" * 300)
    comparison = compare([first, elsewhere, run(corpus)])
    ((name, (reason,)),) = comparison.reasons.items()
    assert name == comparison.runs[2].name
    assert "other data: content of the files" in reason
    shown = {d.run: d.verdict for d in comparison.differences if d.metric == "validation_loss"}
    assert [*shown.values()] == ["too few rows", "not comparable"]
    assert "not known" not in " ".join(comparison.verdicts.values())


def test_text_is_read_once(trainer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = json_lines(tmp_path / "few.jsonl", documents(3))
    run = trainer(**{"validation.dataset": "json", "validation.dataset_path": file, "validation.steps": 100})
    tokens = torch.cat([batch.inputs.flatten() for batch in run.validator.data.batches])
    total = sum(len(run.tokenizer.encode(document)) + 2 for document in documents(3))
    count = len(run.validator.data.batches)
    assert count == (total - 1) // (BATCH * SEQ_LEN) >= 2
    shown = f"validation.steps = 100: the text makes {count} batches of 4 sequences of 32 tokens; every validation"
    assert shown in capsys.readouterr().out
    assert (tokens == run.tokenizer.bos_id).sum() == 3


def test_too_little_text(trainer: Any, tmp_path: Path) -> None:
    file = json_lines(tmp_path / "corpus.jsonl", documents(120))
    with pytest.raises(ConfigError) as error:
        trainer(**{"training.dataset": "json", "training.dataset_path": file, "validation.held_out_percent": 1e-6})
    for part in ("less than one batch of 4 sequences of 32 tokens", "holds out 0 of 120 documents", "= 1e-06)"):
        assert part in str(error.value), part
    short = json_lines(tmp_path / "short.jsonl", ["a word"])
    with pytest.raises(ConfigError, match="less than one batch of 4 sequences of 32 tokens; use more text, or smaller"):
        trainer(**{"validation.dataset": "json", "validation.dataset_path": short})


def test_files_that_are_trained_on_are_refused(trainer: Any, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for name in ("a", "b"):
        json_lines(tmp_path / "corpus" / f"{name}.jsonl", documents(120))
    training = {"training.dataset": "json", "training.dataset_path": tmp_path / "corpus"}
    with pytest.raises(ConfigError) as error:
        trainer(**training, **{"validation.dataset_path": f"{tmp_path}/corpus/../corpus/a.*"})
    message = 'validation.dataset = "json": training reads 1 of its 1 file too, for example '
    assert str(error.value).startswith(f"{message}{tmp_path}/corpus/a.jsonl; name others")
    (tmp_path / "link").hardlink_to(tmp_path / "corpus" / "a.jsonl")
    with pytest.raises(ConfigError, match="training reads 1 of its 1 file too"):
        trainer(**training, **{"validation.dataset_path": tmp_path / "link"})


@pytest.mark.parametrize("name", ["json", "parquet"])
def test_the_files_that_are_compared_are_those_that_are_read(trainer: Any, tmp_path: Path, name: str) -> None:
    """A file whose name could be a pattern for a file that is trained on."""
    suffix = "jsonl" if name == "json" else "parquet"
    for stem, count in (("x[0-9]", 120), ("x5", 130)):
        if name == "json":
            json_lines(tmp_path / f"{stem}.{suffix}", documents(count))
        else:
            Dataset.from_dict({"text": documents(count)}).to_parquet(str(tmp_path / f"{stem}.{suffix}"))
    training = {"training.dataset": name, "training.dataset_path": tmp_path / f"x5.{suffix}"}
    run = trainer(**training, **{"validation.dataset_path": tmp_path / f"x[0-9].{suffix}"})
    assert [file.name for file in run.source.files] == [f"x5.{suffix}"]
    with pytest.raises(ConfigError, match="training reads 1 of its 1 file too"):
        trainer(**training, **{"validation.dataset_path": tmp_path / f"x?.{suffix}"})


def test_documents_that_are_left_out_are_counted(trainer: Any, tmp_path: Path) -> None:
    """In metrics.jsonl, the summary and what is said of validation: exactly, for the steps that were made."""
    lines = [json.dumps({"text": text}) if n % 3 else "broken" for n, text in enumerate(documents(300))]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    options = {"training.dataset": "json", "training.dataset_path": tmp_path / "data.jsonl"}
    run = trainer(**options, **{"data.on_corrupt": "skip", "training.steps": 4, "metrics.log_freq": 1})
    assert re.search(r"without \d+ unreadable documents", run.about["validation"])
    advance(run, 4)
    counts = [row["skipped_documents"] for row in rows(run, "metrics.jsonl")]
    shards = run.loader.state_dict()["shards"]
    expected = 0
    for shard, (epoch, _, document, *_) in shards.items():
        assert epoch == 0
        good = [position.document for position, _ in run.source.documents(int(shard), len(shards), 0, START)]
        expected += document - sum(index < document for index in good)
    assert 0 < counts[0] <= counts[1] <= counts[2] <= counts[3] == expected
    assert re.search(rf"skipped documents +{expected}\n", summary(run.recorder, {}, None, []))


def test_messages_name_the_options_of_validation(trainer: Any, tmp_path: Path) -> None:
    for options, expected in (
        ({"validation.dataset": "text"}, 'validation.dataset = "text": reads local files, and validation.dataset_path'),
        ({"validation.dataset": "c5"}, 'validation.dataset = "c5"'),
        (
            {"validation.dataset": "text", "validation.dataset_path": tmp_path / "no.txt"},
            r'validation.dataset_path = ".*no.txt": there is no such file',
        ),
    ):
        with pytest.raises(ConfigError, match=expected) as error:
            trainer(**options)
        assert "training.dataset" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--validation.dataset=text"], 'validation.dataset = "text" (the argument --validation.dataset): has no'),
        (["--validation.dataset_path=x"], "has no effect unless validation.enable = true"),
        (["--validation.held_out_percent=2"], "validation.held_out_percent = 2.0 (the argument"),
        (["--validation.precision=bfloat16"], 'validation.precision = "bfloat16"'),
        (
            ["--validation.enable", "--validation.dataset=text", "--validation.held_out_percent=2"],
            "has no effect, as validation.dataset names data of their own",
        ),
        (["--validation.enable", "--validation.precision=bfloat16"], "has no effect without a converter"),
        (["--validation.tasks=x"], "has no effect unless validation.enable = true"),
        (["--validation.enable", "--validation.max_examples=3"], "has no effect without validation.tasks"),
        (
            ["--validation.enable", "--validation.tasks=x", "--parallelism.tensor_parallel_degree=2"],
            "a task is not computed under tensor parallelism",
        ),
        (
            [
                *("--validation.enable", "--validation.precision=bfloat16", "--model.converters=float8"),
                "--training.mixed_precision_param=float32",
            ],
            'training.mixed_precision_param = "float32"; set that to bfloat16',
        ),
        (
            [
                *("--validation.enable", "--validation.precision=bfloat16", "--model.converters=float8"),
                "--float8.enable_fsdp_float8_all_gather",
            ],
            "the weights are gathered in their number format",
        ),
    ],
)
def test_options_without_effect_are_refused(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_config(load_config(options), 2 if "parallel" in str(options) else 1)
    assert words in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        ["--validation.interval=5", "--validation.steps=3"],  # they ask for nothing by themselves
        ["--validation.enable", "--validation.dataset=pystdlib", "--validation.held_out_percent=2"],
        ["--validation.enable", "--validation.precision=bfloat16", "--model.converters=float8"],
        ["--job.config_file=phi_4_hellaswag_float8", "--validation.enable=false"],  # a section is turned off as a whole
    ],
)
def test_options_that_are_meant(options: list[str]) -> None:
    check_config(load_config(options), 1)


@pytest.mark.parametrize("value", [0, 100, -1, math.nan])
def test_the_share_is_a_share(value: float) -> None:
    with pytest.raises(ConfigError, match="must be a number, more than 0 and below 100"):
        load_config([f"--validation.held_out_percent={value}"])


# ---- a task


@pytest.fixture
def task(tmp_path: Path) -> Path:
    file = tmp_path / "task.jsonl"
    words = ["import os", "def f():", "return x", "class A:", "for i in y:", "print(z)"]
    examples = [
        {"context": words[n % 6], "endings": [words[(n + i) % 6] for i in range(1, 4)], "label": n % 3}
        for n in range(24)
    ]
    file.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return file


def test_the_accuracy_in_a_task(trainer: Any, task: Path) -> None:
    run = trainer(**FLOAT32, **{"validation.interval": 2, "validation.tasks": task})
    advance(run, 2)
    tokenizer, model = load_tokenizer(), run.model_parts[0]
    right, right_by_bytes = [], []
    for line in task.read_text().splitlines():
        example = json.loads(line)
        scores = []
        for ending in example["endings"]:
            begin = [tokenizer.bos_id, *tokenizer.encode(example["context"])]
            ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(f"{example['context']} {ending}")])
            with torch.no_grad():
                logits = model(ids[None, :-1])[0].log_softmax(-1)
            scores.append(sum(float(logits[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
        right.append(scores.index(max(scores)) == example["label"])
        scores = [score / len(ending) for score, ending in zip(scores, example["endings"])]
        right_by_bytes.append(scores.index(max(scores)) == example["label"])
    (row,) = rows(run, "validation.jsonl")
    assert row["examples"] == 24
    assert row["accuracy"] == sum(right) / 24
    assert row["accuracy_norm"] == sum(right_by_bytes) / 24
    assert row["stderr"] == pytest.approx(math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / 23))


def test_a_task_waits_for_nothing(trainer: Any, task: Path) -> None:
    run = trainer(**{"validation.tasks": task})
    asked = iter([False] * len(run.validator.data.batches) + [True])
    run.validator.run(7, run.recorder, run.compile_watch, lambda: next(asked))
    assert rows(run, "validation.jsonl") == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"validation.tasks": "gone"}, 'validation.tasks = "gone": there is no such file'),
        (
            {"training.seq_len": 8},
            "its ending 1 has 9 tokens: must be 1 to 8, what the model reads at a time (training.s",
        ),
        (
            {"validation.task_data": "copy"},
            'validation.task_data = "copy": is the local copy of hellaswag, and validat',
        ),
    ],
)
def test_a_task_that_cannot_be_computed(trainer: Any, task: Path, options: dict[str, Any], words: str) -> None:
    task.write_text('{"context": "a", "endings": ["b", "' + "x = 1 " * 2 + 'y"], "label": 0}\n')
    with pytest.raises(ConfigError) as error:
        trainer(**{"validation.tasks": task, **options})
    assert words in str(error.value)


def test_a_loss_that_is_not_finite(trainer: Any) -> None:
    run = trainer(**{"training.steps": 5, "validation.interval": 1})
    with torch.no_grad():
        run.model_parts[0].norm.weight.fill_(math.nan)
    with pytest.raises(TrainingError, match="the validation after step 7: loss nan is not finite"):
        run.validator.run(7, run.recorder, run.compile_watch, lambda: False)
    assert rows(run, "validation.jsonl") == []


def test_a_stop_that_was_asked_for_does_not_wait_for_it(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(**{"training.steps": 5, "validation.interval": 1})
    monkeypatch.setattr(run.stop_request, "requested", lambda: True)
    assert run.advance()
    assert rows(run, "validation.jsonl") == []


@pytest.mark.parametrize("when", ["at the step", "in its validation", "after its validation"])
def test_a_request_leaves_out_no_row(trainer: Any, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    """Step 2 lies within a window of three steps."""
    run = trainer(**{"training.steps": 5, "metrics.log_freq": 3, "validation.interval": 2})
    assert not run.advance()
    late = {"at the step": 0, "in its validation": 1, "after its validation": 1 + len(run.validator.data.batches)}
    asked = iter([False] * late[when])
    monkeypatch.setattr(run.stop_request, "requested", lambda: next(asked, True))
    assert run.advance()
    assert [row["step"] for row in rows(run, "metrics.jsonl")] == [1, 2]
    shown = summary(run.recorder, {})
    assert re.search(rf"steps +1 to 2 of 5\n +tokens +{run.recorder.tokens_seen:,}\n", shown)


@pytest.mark.parametrize(
    "options",
    [
        {"lr_scheduler.decay_type": "nothing"},
        {"sample.enable": "true", "sample.prompt": "a b " * 30},
        {"training.compile": "true", "compile.components": ""},
    ],
)
def test_a_refused_run_gives_back_what_it_has_taken(trainer: Any, options: dict[str, Any]) -> None:
    def taken() -> list[Any]:
        return [*map(signal.getsignal, STOP_SIGNALS), gc.isenabled(), threading.active_count()]

    before = taken()
    with pytest.raises(ConfigError) as raised:
        trainer(**options)
    assert raised.value.key == list(options)[-1]
    assert taken() == before


def test_the_compiler_s_graphs_for_validation_are_expected_once(caplog: pytest.LogCaptureFixture) -> None:
    watch = CompileWatch()
    compiled = torch.compile(lambda x: x + 1, backend="eager", dynamic=False)
    with caplog.at_level(logging.INFO):
        for size, done in enumerate((watch.step_done, watch.validation_done, watch.step_done, watch.validation_done)):
            compiled(torch.zeros(size + 2))
            done(1 if size < 2 else 2)
    watch.close()
    said = [(r.levelname, r.getMessage().split(" in ")[0]) for r in caplog.records if "graph" in r.getMessage()]
    assert said == [
        ("INFO", "compiled 1 graph"),
        ("INFO", "for validation, compiled 1 graph"),
        ("WARNING", "step 2 compiled 1 graph again,"),
        ("WARNING", "the validation after step 2 compiled 1 graph again,"),
    ]


def test_a_compiled_run_warns_of_nothing(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    compile_options = {"training.compile": "true", "compile.backend": "aot_eager_decomp_partition"}
    run = trainer(**compile_options, **{"training.steps": 3, "validation.interval": 1, "validation.steps": 1})
    with caplog.at_level(logging.INFO):
        advance(run, 3)
    assert "for validation, compiled" in caplog.text
    assert "again" not in caplog.text
