"""``titanlite evaluate``: losses and choices against transformers, and what its users meet."""

from __future__ import annotations

import gzip
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.families import their_model
from tests.unit.commands.test_generate_command import ARGS, write
from titanlite.commands import evaluate as evaluate_command
from titanlite.data import load_tokenizer
from titanlite.inference.documents import TextLoss
from titanlite.inference.evaluate import Evaluation, evaluate
from titanlite.inference.tasks import read_task

transformers = pytest.importorskip("transformers")

POSITIONS = 64
TEXTS = [
    "import os\n\n\ndef name() -> str:\n    return os.name\n",
    "",
    "Ein längerer Text, in dem nicht jedes Zeichen ein Byte hat: äöü, 漢字, 🙂.\n" * 9,
    "x",
    "for i in range(10):\n    print(i)\n" * 3,
]


def save_their_model(folder: Path, **changed: Any) -> Any:
    """A folder as transformers writes it, with titanlite's tokenizer; returns the model."""
    model = their_model("llama, one kv head, wide heads", vocab_size=2048, max_position_embeddings=POSITIONS, **changed)
    model.save_pretrained(folder)
    load_tokenizer().save(folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("theirs")
    save_their_model(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    """Their model and tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return json_lines(tmp_path_factory.mktemp("data") / "documents.jsonl", [{"text": text} for text in TEXTS])


def json_lines(file: Path, records: Sequence[Any]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def run(capfd: pytest.CaptureFixture[str], *options: object) -> tuple[int, str, str]:
    capfd.readouterr()
    status = evaluate_command.main([str(option) for option in options])
    return status, *capfd.readouterr()


def log_likelihoods(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Log-likelihoods of each token but the first, by transformers: float64 [n - 1]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0]
    return F.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


# ---- the loss of documents


@pytest.mark.parametrize("seq_len", [POSITIONS, 7, 1])
def test_the_loss_is_that_of_transformers_document_by_document(
    folder: Path, theirs: tuple[Any, Any], lines: Path, seq_len: int, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = theirs
    total, tokens = 0.0, 0
    for text in filter(None, TEXTS):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        ids = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        for begin in range(0, len(ids) - 1, seq_len):
            piece = log_likelihoods(model, ids[begin : begin + seq_len + 1])
            total, tokens = total - float(piece.sum()), tokens + len(piece)
    status, out, err = run(capfd, "--checkpoint", folder, "--data", lines, "--json", "--seq_len", seq_len)
    assert status == 0, err
    values = json.loads(out.splitlines()[-1])
    nbytes = len("".join(TEXTS).encode())
    assert (values["tokens"], values["documents"], values["bytes"]) == (tokens, 4, nbytes)
    assert values["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert values["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)
    assert values["bits_per_byte"] == pytest.approx(total / math.log(2) / nbytes, rel=1e-5)
    assert "documents.jsonl: 1 document without a token left out" in err


def test_every_form_of_the_same_documents(folder: Path, tmp_path: Path) -> None:
    """Files of text, whole: one is longer than what a source cuts."""
    import pyarrow
    from pyarrow import parquet

    texts = [*TEXTS, (" " * 40 + "x\n") * 1600]
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    for number, text in enumerate(texts):
        (tmp_path / "texts" / "deep" / f"{number}.txt").write_text(text)
    array, compressed = tmp_path / "array.json", tmp_path / "lines.jsonl.gz"
    records = [{"body": text} for text in texts]
    array.write_text(json.dumps(records))
    compressed.write_bytes(gzip.compress(json_lines(tmp_path / "lines.jsonl", records).read_bytes()))
    parquet.write_table(pyarrow.table({"body": texts, "other": [0] * len(texts)}), tmp_path / "table.parquet")
    forms = ["texts", "texts/**/*.txt", "array.json", "lines.jsonl", "lines.jsonl.gz", "table.parquet"]
    results = [evaluate(str(folder), str(tmp_path / form), text_field="body").text for form in forms]
    assert results[0] is not None
    assert results[0].nbytes == len("".join(texts).encode())
    assert [result == results[0] for result in results] == [True] * len(forms)
    first = evaluate(str(folder), str(tmp_path / "lines.jsonl"), text_field="body", max_documents=3).text
    assert first is not None
    assert (first.documents, first.left_out) == (2, 1)


def test_a_run_its_checkpoint_and_a_source_as_a_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "checkpoint" / "step-3", ARGS["gqa"])
    asked = ("--data=pystdlib", "--max_documents=2", "--dtype=bfloat16")
    status, table, err = run(capfd, "--checkpoint", tmp_path, *asked)
    assert status == 0, err
    assert "its latest checkpoint is" in err
    names = [line.rsplit(maxsplit=1)[0].strip() for line in table.splitlines()]
    assert names == ["loss", "perplexity", "bits per byte", "tokens", "bytes", "documents"]
    assert run(capfd, "--checkpoint", tmp_path / "checkpoint" / "step-3", *asked)[1] == table
    quantized = run(capfd, "--checkpoint", tmp_path, *asked, "--quantize=float8_dynamic")
    assert quantized[0] == 0, quantized[2]
    assert quantized[1] != table
    assert quantized[1].splitlines()[3:] == table.splitlines()[3:]


# ---- tasks

HELLASWAG = [
    {
        "ind": 4,
        "activity_label": "Removing ice from car",
        "ctx_a": "Then, the man writes over the snow.",
        "ctx_b": "then He",
        "ctx": "unused",
        "endings": [", the man adds wax [substeps] to it.", ", a person boards a ski  lift.", " goes on", "äö, 漢字"],
        "label": "3",
    },
    {
        "activity_label": "Home [title] and garden",
        "ctx_a": "[header] How to dig [title] Get a spade. [step] Dig",
        "ctx_b": "",
        "endings": ["[substeps] Deep.", "a hole. [title] Then rest."],
        "label": "0",
    },
]
# As lm-evaluation-harness makes them.
PREPARED = [
    (
        "Removing ice from car: Then, the man writes over the snow. Then he",
        [", the man adds wax to it.", ", a person boards a ski lift.", "goes on", "äö, 漢字"],
    ),
    ("Home. and garden: How to dig. Get a spade. Dig", [" Deep.", "a hole.. Then rest."]),
]


def test_the_text_of_hellaswag(tmp_path: Path) -> None:
    examples = read_task("hellaswag", str(json_lines(tmp_path / "a.jsonl", HELLASWAG)))
    assert [(e.context, list(e.endings)) for e in examples] == [
        (context, [f" {ending}" for ending in endings]) for context, endings in PREPARED
    ]
    assert [e.label for e in examples] == [3, 0]


def made_examples() -> list[dict[str, Any]]:
    """Examples of other lengths, numbers of endings, labels, and borders."""
    words = ["import", "os", "return", "def", "class", "while", "not", "lambda", "yield", "from", "with", "except"]
    generator = torch.Generator().manual_seed(0)

    def some(most: int) -> str:
        n = int(torch.randint(1, most, (), generator=generator))
        return " ".join(words[int(i)] for i in torch.randint(len(words), (n,), generator=generator))

    examples = []
    for number in range(40):
        endings = [f"{some(12)} ä{i}" for i in range(2 + number % 4)]
        context = "" if number == 7 else some(200 if number % 8 == 3 else 30) + ("  " if number % 5 == 1 else "")
        examples.append({"context": context, "endings": endings, "label": number % len(endings)})
    return examples


@pytest.mark.parametrize("adds_bos", [True, False], ids=["BOS", "no BOS"])
def test_choices_are_those_of_transformers_example_by_example(
    tmp_path: Path, adds_bos: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    model = save_their_model(tmp_path / "theirs")
    if not adds_bos:
        file = tmp_path / "theirs" / "tokenizer.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    examples = made_examples()
    right: list[tuple[bool, bool]] = []
    truncated = 0
    for example in examples:
        scores = []
        for ending in example["endings"]:
            context = example["context"].rstrip()
            before = tokenizer(context).input_ids if context else [tokenizer.bos_token_id]
            joint = example["context"] + ("" if example["context"][-1:] in ("", " ") else " ") + ending
            whole = tokenizer(joint, add_special_tokens=bool(context and adds_bos)).input_ids
            after = whole[len(before) if context else 0 :]
            ids = [*before, *after][-(POSITIONS + 1) :]
            scores.append(float(log_likelihoods(model, ids)[-len(after) :].sum()))
        truncated += len(before) + len(after) > POSITIONS + 1
        normalized = [score / len(ending.encode()) for score, ending in zip(scores, example["endings"])]
        best = [max(range(len(column)), key=column.__getitem__) for column in (scores, normalized)]
        right.append((best[0] == example["label"], best[1] == example["label"]))
    file = json_lines(tmp_path / "task.jsonl", examples)
    status, out, err = run(capfd, "--checkpoint", tmp_path / "theirs", "--tasks", file, "--json")
    assert status == 0, err
    values = json.loads(out)
    shares = [sum(column) / 40 for column in zip(*right)]
    assert 0 < shares[0] != shares[1]
    errors = [torch.tensor(column).double().std().item() / math.sqrt(40) for column in zip(*right)]
    assert values["examples"] == 40
    assert [values["accuracy"], values["accuracy_norm"]] == shares
    assert [values["stderr"], values["stderr_norm"]] == pytest.approx(errors)
    assert truncated > 1
    assert f"the context of {truncated} examples lost its beginning, to fit in {POSITIONS} tokens" in err
    one_by_one = [
        evaluate(str(tmp_path / "theirs"), tasks=str(json_lines(tmp_path / "one.jsonl", [example]))).choices
        for example in examples[:12]
    ]
    assert [(e.accuracy, e.accuracy_norm, e.stderr) for e in one_by_one if e] == [(*r, None) for r in right[:12]]
    together = evaluate(str(tmp_path / "theirs"), tasks=str(file)).choices
    assert together is not None
    assert together.right == tuple(right)


@pytest.mark.long
def test_hellaswag_is_that_of_lm_evaluation_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    save_their_model(tmp_path / "theirs")
    marks = ["[title] ", "[header] ", "  "]
    records = [
        {
            "activity_label": "Cleaning",
            "ctx_a": marks[number % 3] + example["context"],
            "ctx_b": "THEN he" if number % 2 else "",
            "endings": [f"{'abcd'[i]}{example['endings'][i % len(example['endings'])]}" for i in range(4)],
            "label": str(number % 4),
        }
        for number, example in enumerate(made_examples())
    ]
    data = json_lines(tmp_path / "task.jsonl", records)
    theirs = Path(lm_eval.__file__).parent / "tasks" / "hellaswag"
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "utils.py").write_text((theirs / "utils.py").read_text())
    task = (theirs / "hellaswag.yaml").read_text().replace("training_split: train\n", "")
    task = task.replace("task: hellaswag", "task: local").replace("dataset_path: Rowan/hellaswag", "dataset_path: json")
    files = f"dataset_kwargs: {{data_files: {{validation: {data}}}}}"
    task = task.replace("dataset_name: null", files).replace("metric: acc_norm", "metric: acc_bytes")
    (tmp_path / "tasks" / "local.yaml").write_text(task)
    expected = lm_eval.simple_evaluate(
        model=HFLM(pretrained=str(tmp_path / "theirs"), device="cpu", dtype="float32", batch_size=4),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
    )["results"]["local"]
    status, out, err = run(
        capfd, "--checkpoint", tmp_path / "theirs", "--tasks=hellaswag", "--task_data", data, "--json"
    )
    assert status == 0, err
    values = json.loads(out)
    assert values["accuracy"] == expected["acc,none"]
    assert values["stderr"] == pytest.approx(expected["acc_stderr,none"])
    assert values["accuracy_norm"] == expected["acc_bytes,none"]
    assert 0 < values["accuracy"] != values["accuracy_norm"]


def test_text_and_task_together(folder: Path, lines: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = json_lines(tmp_path / "task.jsonl", HELLASWAG)
    status, out, err = run(capfd, "--checkpoint", folder, "--data", lines, "--tasks", task, "--max_examples", 1)
    assert status == 0, err
    assert [line.split()[0] for line in out.splitlines()][-3:] == ["accuracy", "accuracy", "examples"]
    status, out, err = run(
        capfd, "--checkpoint", folder, "--data", lines, "--tasks=hellaswag", "--task_data", task, "--json"
    )
    assert list(json.loads(out)) == [
        *("loss", "perplexity", "bits_per_byte", "tokens", "bytes", "documents"),
        *("accuracy", "accuracy_norm", "stderr", "stderr_norm", "examples"),
    ]


# ---- what cannot be evaluated


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate: name text with --data, or a task with --tasks"),
        (["--data=gone.jsonl"], '--data = "gone.jsonl": there is no such file or folder'),
        (["--data=pystdlb"], "or name a data source: c4, fineweb_edu, hub:owner/name, pystdlib"),
        (
            ["--data=LINES", "--text_field=body"],
            'document 1: no field "body" (it has: text); name the right one with --text',
        ),
        (["--data=LINES", "--seq_len=65"], "--seq_len = 65: must be 1 to 64, the positions of the model"),
        (["--data=LINES", "--seq_len=0"], "--seq_len = 0: must be 1 to 64"),
        (["--data=LINES", "--max_documents=0"], "--max_documents = 0: must be at least 1"),
        (["--data=LINES", "--max_examples=1"], "--max_examples = 1: has no effect without --tasks"),
        (["--data=LINES", "--tokenizer_path=OTHER"], "is another tokenizer"),
        (["--tasks=hellaswagg"], "there is no such file or folder"),
        (["--tasks=LINES", "--task_data=x"], '--task_data = "x": is the local copy of hellaswag, and --tasks is'),
        (["--tasks=LINES"], 'documents.jsonl, record 1: has no "context"'),
        (["--tasks=LINES", "--quantize=float9"], "float9"),
        (["--tasks=LINES", "--checkpoint=nowhere"], "nowhere is no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_message(
    folder: Path, lines: Path, tmp_path: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from tests.unit.commands.test_generate_command import larger_tokenizer

    task = json_lines(tmp_path / "task.jsonl", made_examples()[:1])
    if "quantize" in str(options) or "checkpoint" in str(options):
        options = [option.replace("LINES", str(task)) for option in options]
    options = [option.replace("LINES", str(lines)) for option in options]
    if "--tokenizer_path=OTHER" in options:
        options = [option.replace("OTHER", str(larger_tokenizer(tmp_path))) for option in options]
    status, out, err = run(capfd, "--checkpoint", folder, *options)
    assert (status, out) == (2, "")
    assert message in err
    assert err.splitlines()[-1].startswith("titanlite evaluate: ")


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "there is no document"),
        ([{"text": ""}], r"no document with a token in it (1 document without one)"),
        ([{"text": "a"}, {"text": 3}], 'document 2: the field "text" is not a string (int); --text_field names it'),
        ([{"text": "a"}, "b"], "document 2: a JSON str, not an object"),
    ],
    ids=str,
)
def test_documents_that_cannot_be_read(
    folder: Path, tmp_path: Path, records: list[Any], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = json_lines(tmp_path / "bad.jsonl", records)
    status, out, err = run(capfd, "--checkpoint", folder, "--data", file)
    assert (status, out) == (2, "")
    assert message in err
    assert "training." not in err
    assert "data.on_corrupt" not in err


def test_files_that_are_no_documents(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    json_lines(tmp_path / "a.jsonl", [{"text": "a"}])
    (tmp_path / "b.txt").write_bytes(b"hello\xffworld")
    messages = {tmp_path: "has files of JSON and text; narrow it", tmp_path / "*.txt": "b.txt, byte 6: invalid UTF-8"}
    for data, message in messages.items():
        status, out, err = run(capfd, "--checkpoint", folder, "--data", data)
        assert (status, out) == (2, "")
        assert message in err


def test_a_perplexity_that_is_too_large_for_a_number() -> None:
    evaluation = Evaluation(TextLoss(loss=1000.0, tokens=2, nbytes=1, documents=1, left_out=0), None, ())
    assert json.loads(evaluation.json())["perplexity"] is None
    assert "perplexity     too large" in evaluation.table()


GOOD: dict[str, Any] = {"context": "a", "endings": ["b", "c"], "label": 1}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({**GOOD, "label": 2}, "label = 2 must be the index of an ending, 0 to 1"),
        ({**GOOD, "label": -1}, "label = -1 must be the index of an ending, 0 to 1"),
        ({**GOOD, "label": ""}, 'label = "" must be the index of an ending, 0 to 1; the test split of hellaswag has'),
        ({**GOOD, "label": "9" * 5000}, 'label = "999'),
        ({**GOOD, "label": True}, "label = true must be the index of an ending"),
        ({**GOOD, "endings": "bc"}, 'its "endings" must be a list of two texts or more'),
        ({**GOOD, "endings": ["b"]}, 'its "endings" must be a list of two texts or more'),
        ({**GOOD, "endings": ["b", ""]}, "its ending 1 is empty"),
        ({**GOOD, "endings": ["b", "c " * 70]}, "its ending 1 has 71 tokens: must be 1 to 64"),
        ({**GOOD, "context": None}, "its context must be a text"),
        ({**GOOD, "context": "\ud800"}, "has half of a surrogate pair"),
        ({"context": "a", "label": 0}, 'has no "endings"; an example has context, endings, label, or the fields of'),
        (["a"], "is a JSON list, and must be an object"),
    ],
    ids=str,
)
def test_examples_that_are_none(
    folder: Path, tmp_path: Path, example: Any, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    file = json_lines(tmp_path / "bad.jsonl", [GOOD, example])
    status, out, err = run(capfd, "--checkpoint", folder, "--tasks", file)
    assert (status, out) == (2, "")
    assert f"bad.jsonl, record 2: {message}" in err


def test_files_without_examples(tmp_path: Path, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "no.jsonl").write_text("context,endings\n")
    (tmp_path / "no.parquet").write_bytes(b"PAR1" * 9)
    messages = {
        "empty.jsonl": "there is no example in it",
        "no.jsonl": "record 1: no JSON",
        "no.parquet": "replace the file or leave it out of --tasks",
    }
    for name, message in messages.items():
        status, _, err = run(capfd, "--checkpoint", folder, "--tasks", tmp_path / name)
        assert status == 2
        assert message in err


def test_a_task_in_parquet(folder: Path, tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(HELLASWAG[:1]), tmp_path / "task.parquet")
    lines = json_lines(tmp_path / "task.jsonl", HELLASWAG[:1])
    results = [evaluate(str(folder), tasks=str(file)).choices for file in (tmp_path / "task.parquet", lines)]
    assert results[0] == results[1] is not None


def test_hellaswag_without_a_network(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    status, _, err = run(capfd, "--checkpoint", folder, "--tasks=hellaswag")
    assert status == 2
    assert '--tasks = "hellaswag": Rowan/hellaswag cannot be read from the Hugging Face hub' in err
    assert "a copy of its validation split with --task_data" in err


def test_progress_is_for_terminals(
    folder: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    options = ("--checkpoint", folder, "--data", lines, "--tasks", json_lines(tmp_path / "task.jsonl", made_examples()))
    quiet = run(capfd, *options)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    status, out, err = run(capfd, *options)
    assert (status, out) == quiet[:2]
    first, *shown = err.split("\r\x1b[K")
    assert first == ""
    assert shown[0].startswith("4 documents, ")
    assert shown[1] == "40 of 40 examples"
    assert "".join(shown[2:]) == quiet[2]


@pytest.mark.parametrize("asked", ["data", "tasks"])
def test_a_loss_that_is_not_finite_is_no_number(
    tmp_path: Path, lines: Path, asked: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of one document alone: a token of it has an embedding of NaN. So has the first token, which no text has."""
    model = save_their_model(tmp_path / "theirs")
    (token,) = load_tokenizer().encode("x")
    assert all(0 not in load_tokenizer().encode(text) for text in TEXTS)
    with torch.no_grad():
        model.get_input_embeddings().weight[[0, token]] = math.nan
    model.save_pretrained(tmp_path / "theirs")
    task = json_lines(tmp_path / "task.jsonl", [GOOD, {**GOOD, "context": "x"}])
    given = {"data": lines, "tasks": task}
    status, out, err = run(capfd, "--checkpoint", tmp_path / "theirs", f"--{asked}", given[asked], "--json")
    assert (status, out) == (1, "")
    expected = {"data": "the loss of document 4 is nan", "tasks": "task.jsonl, record 2: the log-likelihoods of the"}
    assert expected[asked] in err
