"""Whole runs on instructions, chats and HellaSwag: packed, resumed, and on two processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import LITTLE, Run, checkpoints, run_trainer

FIELDS: dict[str, Any] = {
    "instruct": lambda x, y: {"prompt": f"{x} + {y} = ", "answer": str(x + y)},
    "chat": lambda x, y: {
        "messages": [{"role": "user", "content": f"{x} + {y}"}, {"role": "assistant", "content": f"It is {x + y}."}]
    },
    "hellaswag": lambda x, y: {"ctx": f"{x} plus {y} is", "endings": [str(x + y + k) for k in range(4)], "label": "0"},
}


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    rng = random.Random(0)
    numbers = [(rng.randrange(100), rng.randrange(100)) for _ in range(200)]
    paths = {name: tmp_path / f"{name}.jsonl" for name in FIELDS}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(FIELDS[name](x, y)) + "\n" for x, y in numbers))
    return paths


def losses(run: Run) -> list[float]:
    assert run.status == 0, run.output
    return [row["loss"] for row in run.rows()]


@pytest.mark.parametrize("dataset", FIELDS)
def test_a_resumed_run_equals_an_undisturbed_one(tmp_path: Path, data: dict[str, Path], dataset: str) -> None:
    options: dict[str, Any] = {
        **LITTLE,
        **checkpoints(2),
        "training__dataset": dataset,
        "training__dataset_path": data[dataset],
        "training__seq_len": 96,
        "training__global_batch_size": 4,
        "validation__enable": "true",
        "validation__held_out_percent": 20,
        "validation__steps": 1,
        "validation__interval": 2,
    }
    whole = run_trainer(tmp_path, name="whole", training__steps=4, **options)
    losses(run_trainer(tmp_path, name="cut", training__steps=2, **options))
    cut = run_trainer(tmp_path, name="cut", training__steps=4, **options)
    assert losses(cut) == losses(whole)
    assert "whole examples, which do not attend to each other" in whole.output
    validation = [json.loads(line)["loss"] for line in (whole.folder / "validation.jsonl").read_text().splitlines()]
    assert len(validation) == 2
    two = run_trainer(tmp_path, 2, name="two", training__steps=4, **{**options, "training__local_batch_size": 2})
    assert losses(two) == pytest.approx(losses(whole), rel=2e-3)  # in bfloat16


def test_what_cannot_be_used_is_said_and_counted(tmp_path: Path, data: dict[str, Path]) -> None:
    """A label out of range stops the run with its line; skipped, it counts; a truncated example counts too."""
    lines = data["hellaswag"].read_text().splitlines()
    broken = json.loads(lines[0]) | {"label": "4"}
    long = json.loads(lines[1]) | {"ctx": "so " * 300}
    ending = json.loads(lines[2]) | {"endings": ["and " * 300] * 4}
    data["hellaswag"].write_text("\n".join(map(json.dumps, (broken, long, ending))) + "\n" + "\n".join(lines[3:40]))
    options: dict[str, Any] = {
        "training__dataset": "hellaswag",
        "training__dataset_path": data["hellaswag"],
        "training__seq_len": 96,
        "training__local_batch_size": 2,
        "training__steps": 8,
    }
    stopped = run_trainer(tmp_path, name="stopped", **options)
    assert stopped.status == 2
    assert "hellaswag.jsonl, line 1:" in stopped.output
    assert "out of range" in stopped.output
    assert "Traceback" not in stopped.output
    skipping = run_trainer(tmp_path, name="skipping", data__on_corrupt="skip", **options)
    assert skipping.status == 0, skipping.output
    last = skipping.rows()[-1]
    assert last["skipped_documents"] >= 2  # the label; the prompt that leaves no room for its answer
    assert last["truncated_examples"] >= 1


def test_context_parallelism_is_refused(tmp_path: Path, data: dict[str, Path]) -> None:
    options = {"training__dataset": "instruct", "training__dataset_path": data["instruct"]}
    run = run_trainer(tmp_path, 2, parallelism__context_parallel_degree=2, **options)
    assert run.status == 2
    assert "parallelism.context_parallel_degree = 2: attention over a sequence" in run.output
