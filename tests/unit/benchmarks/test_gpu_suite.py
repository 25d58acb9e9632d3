"""scripts/gpu_suite.sh without a GPU: its limits, its list of what was left out, and what it leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import suite_summary

from tests.support.forks import ROOT

pytestmark = pytest.mark.long

SECTIONS = ["tests", "peers", "linear", "casts", "matmul", "eager", "budget", "train", "roofline", "loss_curves"]


def suite(out: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_suite.sh"), str(out), *arguments],
        env={**os.environ, "GPU_SUITE_DEVICE": "cpu", "PYTHON": python, "TITANLITE_COMMIT": "abc1234"},
        capture_output=True,
        text=True,
        timeout=280,
    )


def python_that(folder: Path, script: str, does: str) -> str:
    """An interpreter that ``does`` something of its own, in the shell's language, in place of ``script``."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\ncase "$*" in *{script}*) {does} ;; *) exec {sys.executable} "$@" ;; esac\n')
    path.chmod(0o755)
    return str(path)


def packed(out: Path) -> set[str]:
    with tarfile.open(out / "rest.tar.gz") as tar:
        return {Path(name).name for name in tar.getnames()}


def test_a_benchmark_runs_and_leaves_its_result(tmp_path: Path) -> None:
    done = suite(tmp_path, "250", "matmul")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matmul.json", "rest.tar.gz", "summary.txt"]
    assert json.loads((tmp_path / "matmul.json").read_text())["commit"] == "abc1234"
    text = (tmp_path / "summary.txt").read_text()
    assert "commit abc1234" in text
    assert "Toy sizes" in text
    assert "matmul.log" in packed(tmp_path)


def test_without_time_all_is_left_out_and_out_has_eight_files(tmp_path: Path) -> None:
    for name in SECTIONS[1:]:
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": []}))
    done = suite(tmp_path, "0")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (tmp_path / "summary.txt").read_text().splitlines()
    for name in SECTIONS:
        assert any(line.startswith(name) and "left out" in line for line in lines), name
    assert len(list(tmp_path.iterdir())) == 8
    assert {"roofline.json", "loss_curves.json"} < packed(tmp_path)


def test_a_section_is_stopped_at_its_limit_and_the_next_is_left_out(tmp_path: Path) -> None:
    python = python_that(tmp_path, "benchmarks/matmul.py", "echo begun; exec sleep 100")
    done = suite(tmp_path / "out", "17", "matmul", "loss_curves", python=python)
    assert done.returncode == 1
    matmul, curves = [line for line in done.stdout.splitlines() if line.startswith(("matmul: ", "loss_curves: "))]
    assert "stopped" in matmul
    assert matmul.endswith("last: begun")
    assert "loss_curves: left out" in curves
    assert "and it needs 100" in curves


def test_chosen_sections_share_the_time(tmp_path: Path) -> None:
    python = python_that(tmp_path, "benchmarks", """echo "$@"; case "$*" in *suite_summary*) exec true ;; esac""")
    done = suite(tmp_path / "out", "395", "roofline", "peers", python=python)
    given = {line.split(":")[0]: line for line in done.stdout.splitlines() if "--seconds=" in line}
    assert "--seconds=292" in given["peers"]  # 300 of 390 parts, less what it has to end in
    assert "--seconds=382" in given["roofline"]  # all that is left


def test_a_section_that_fails_says_its_last_word_and_fails_the_suite(tmp_path: Path) -> None:
    python = python_that(tmp_path, "benchmarks/matmul.py", "echo it broke; exit 7")
    done = suite(tmp_path / "out", "100", "matmul", python=python)
    assert done.returncode == 1
    assert "matmul: failed (7)" in done.stdout
    assert "it broke" in (tmp_path / "out" / "summary.txt").read_text()


def test_without_pytest_the_tests_are_left_out(tmp_path: Path) -> None:
    done = suite(tmp_path / "out", "60", "tests", python=python_that(tmp_path, "import?pytest", "exit 1"))
    assert done.returncode == 0
    assert "tests: left out (0 s) pytest is not installed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["soon"], "must be a whole number of seconds"), (["9", "peer"], "there is no such section")],
)
def test_wrong_arguments(tmp_path: Path, arguments: list[str], says: str) -> None:
    done = suite(tmp_path, *arguments)
    assert done.returncode == 2
    assert says in done.stderr


def rows(config: str, **values: Any) -> list[dict[str, Any]]:
    return [{"system": "titanlite", "config": config, "compile": True, **values}]


def test_targets_are_held_against_the_worst_row() -> None:
    target = next(t for t in suite_summary.TARGETS if t.measure == "rowwise over our bf16, compiled")
    assert suite_summary.judged(target, {})[""] == "not measured"
    good, bad = rows("rowwise", speedup_over_bf16=1.3), rows("rowwise", speedup_over_bf16=1.2)
    assert suite_summary.judged(target, {"peers": good})[""] == "met"
    assert suite_summary.judged(target, {"train": good + bad})[""] == "MISSED"
    linear = next(t for t in suite_summary.TARGETS if t.measure.startswith("linear, rowwise, 8192 x 4096 x 4096"))
    fast, slow = ({"m": 8192, "k": 4096, "n": 4096, "kernels": k} for k in ("triton", "inductor"))
    measured = rows("rowwise", speedup_over_bf16=1.6, **fast) + rows("rowwise", speedup_over_bf16=1.1, **slow)
    assert suite_summary.judged(linear, {"linear": measured})["found"] == "1.600"
    memory = next(t for t in suite_summary.TARGETS if t.at_most)
    assert suite_summary.judged(memory, {"train": rows("tensorwise", memory_over_bf16=1.01)})[""] == "MISSED"
