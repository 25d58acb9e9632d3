"""``titanlite evaluate`` on two processes against one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.forks import on_ranks
from tests.support.runs import environment, run_command
from tests.unit.commands.test_generate_command import ARGS, run_by_torchrun, write
from titanlite.commands import evaluate as evaluate_command
from titanlite.inference import score
from titanlite.inference.evaluate import evaluate

WORDS = ["import os", "return x", "for i in range(3):", "    print(i)", "class A:", "def f(self) -> None:"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "step-3"
    write(folder, ARGS["gqa"])
    return folder


def inputs(folder: Path) -> dict[str, str]:
    """Documents and examples of many lengths, for several batches and more than one window of them."""
    documents = [{"text": "\n".join(WORDS[(i + j) % 6] for j in range(1 + i * 7 % 40))} for i in range(50)]
    examples = [
        {"context": WORDS[i % 6], "endings": [WORDS[(i + j) % 6] * (1 + i % 3) for j in range(1, 4)], "label": i % 3}
        for i in range(30)
    ]
    files = {"data": folder / "documents.jsonl", "tasks": folder / "examples.jsonl"}
    for file, records in zip(files.values(), (documents, examples)):
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return {name: str(file) for name, file in files.items()}


def values(checkpoint: str, given: dict[str, str]) -> dict[str, Any]:
    score._POSITIONS_ON_CPU, score._BATCHES = 128, 4  # of this process alone, which is a fork
    return evaluate(checkpoint, **given).values()


def status(checkpoint: str, good: str, bad: str) -> int:
    """That of rank 0 with one file, and of rank 1 with another."""
    data = bad if os.environ["RANK"] == "1" else good
    return evaluate_command.main([f"--checkpoint={checkpoint}", f"--data={data}"])


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_compute_what_one_does(checkpoint: Path, tmp_path: Path, ranks: int) -> None:
    given = inputs(tmp_path)
    one, several = (on_ranks(n, tmp_path / str(n), environment(), values, str(checkpoint), given) for n in (1, ranks))
    assert one[0]["documents"] == 50
    assert one[0]["tokens"] > 128 * 4 * 3
    assert 0 < one[0]["accuracy"] < 1
    assert several == one * ranks


def test_both_end_with_the_error_of_one(checkpoint: Path, tmp_path: Path) -> None:
    good = inputs(tmp_path)["data"]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(Path(good).read_text() + '{"text": 3}\n')
    assert on_ranks(2, tmp_path / "ranks", environment(), status, str(checkpoint), good, str(bad)) == [2, 2]
    output = (tmp_path / "ranks" / "output.txt").read_text()
    assert output.count("titanlite evaluate: ") == 1
    assert 'bad.jsonl, document 51: the field "text" is not a string' in output


@pytest.mark.slow
def test_torchrun_prints_once(checkpoint: Path, tmp_path: Path) -> None:
    options = [f"--{key}={value}" for key, value in inputs(tmp_path).items()]
    given = ("evaluate", f"--checkpoint={checkpoint}", *options, "--json")
    one, two = (run(tmp_path, *given) for run in (run_command, run_by_torchrun))
    assert one.returncode == two.returncode == 0, two.stderr
    assert two.stdout == one.stdout
    assert len(two.stdout.splitlines()) == 1
