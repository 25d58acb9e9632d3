"""scripts/benchmarks/finetune.py: its data have no leakage, it runs from end to end, and its file shows what the docs
say."""

from __future__ import annotations

import ast
import json
import math
from collections import Counter
from pathlib import Path

import finetune
import instruction_set
import pytest
import tables
from instruction_set import InstructionSet


@pytest.fixture(scope="module")
def made() -> InstructionSet:
    return instruction_set.make(parts=8, train=12, held_out=6)


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.slow
def test_nothing_held_out_is_in_the_text_for_training(made: InstructionSet) -> None:
    everything = squeezed("".join(instruction_set.pretraining_texts(made, forms=2)))
    questions = squeezed("".join(function.source for function in made.train))
    for function in made.held_out:
        assert squeezed(function.source) not in questions
        assert squeezed(function.source) not in everything
    for function in made.train:
        assert squeezed(function.source) in everything
    trees = {ast.unparse(ast.parse(function.source)) for function in made.train}
    assert not trees & {ast.unparse(ast.parse(function.source)) for function in made.held_out}


@pytest.mark.slow
def test_a_question_does_not_name_its_answer_and_each_part_has_as_many(made: InstructionSet) -> None:
    for functions, each in ((made.train, 12), (made.held_out, 6)):
        assert Counter(function.part for function in functions) == dict.fromkeys(made.parts, each)
        assert not [f for f in functions if f" {f.part.strip('_')}" in f.source]


@pytest.mark.slow
def test_choices_have_one_true_answer_and_balanced_labels(made: InstructionSet) -> None:
    lines = instruction_set.choices(made)
    part_of = {function.question: function.part for function in made.held_out}
    for line in lines:
        assert len(set(line["endings"])) == 4
        assert set(line["endings"]) <= set(made.parts)
        assert line["endings"][line["label"]] == part_of[line["context"]]
    assert len(lines) == len(part_of) == 48
    assert Counter(line["label"] for line in lines) == dict.fromkeys(range(4), 12)


@pytest.mark.slow
def test_shuffled_answers_are_the_same_answers(made: InstructionSet) -> None:
    true, shuffled = instruction_set.records(made.train), instruction_set.shuffled(made.train, "1")
    assert [line["prompt"] for line in true] == [line["prompt"] for line in shuffled]
    assert Counter(line["answer"] for line in true) == Counter(line["answer"] for line in shuffled)
    kept = sum(a == b for a, b in zip(true, shuffled))
    assert kept < len(true) / 3


@pytest.mark.long
def test_it_runs_and_goes_on_after_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, work = tmp_path / "finetune.json", tmp_path / "work"
    given = ["--parts=4", "--train=4", "--held-out=2", "--forms=1", "--seeds=2", "--pretrain-steps=2", "--steps=2"]
    tiny = ["--model.flavor=debugmodel", "--training.local_batch_size=1", "--training.seq_len=160"]
    monkeypatch.setattr("sys.argv", ["finetune.py", *given, f"--work={work}", f"--output={out}", *tiny])
    assert finetune.main() in (0, 1)
    rows = json.loads(out.read_text())["results"]
    assert [row["config"] for row in rows] == ["pretrained", "bf16", "rowwise", "shuffled"]
    for row in rows:
        assert len(row["losses"]) == len(row["answer_loss"]) == (1 if row["config"] == "pretrained" else 2)
        assert all(math.isfinite(loss) for loss in row["answer_loss"])
        assert row["examples"] == 8
    assert "shuffled answers: the loss falls by less than 15%" in capsys.readouterr().out
    # What is done is not done again, and the same set is made.
    files = {path: path.read_bytes() for path in work.glob("*.jsonl")}
    assert len(files) == 6
    monkeypatch.setattr(finetune, "train", None)
    out.unlink()
    finetune.main()
    assert json.loads(out.read_text())["results"] == rows
    assert files == {path: path.read_bytes() for path in work.glob("*.jsonl")}


def test_the_docs_claim_what_was_measured() -> None:
    content = json.loads((tables.RESULTS / "finetune.json").read_text(encoding="utf-8"))
    held = finetune.claims(content["results"])
    assert all(held.values()), held
    assert all(len(row["answer_loss"]) == 3 for row in content["results"] if row["config"] != "pretrained")
