"""The benchmarks for a GPU, at toy size on the CPU: that they run, notice what is wrong, and say what they left out."""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import casts
import harness
import linear
import matmul
import peers
import pytest
import roofline
import suite_summary
import torch
import train as train_benchmark

pytestmark = pytest.mark.long


def results_of(file: Path) -> list[dict[str, Any]]:
    content = json.loads(file.read_text())
    assert content["toy"] is True
    assert content["device"].startswith("CPU")
    return content["results"]


# ---- what they share


def test_a_child_ends_at_its_limit_with_all_that_it_started(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    grandchild = f"import time, pathlib; time.sleep(3); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    child = harness.run([sys.executable, "-c", code], limit=1)
    assert child.status is None
    assert "stopped at its limit" in child.why()
    time.sleep(4)
    assert not mark.exists()


def test_a_child_says_why_it_failed() -> None:
    child = harness.run([sys.executable, "-c", "print('before'); raise ValueError('because')"], limit=60)
    assert child.status == 1
    assert child.why() == "status 1: ValueError: because"


def test_the_median_is_of_calls_in_turn() -> None:
    calls: list[str] = []
    seconds = harness.time_in_turn(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, "cpu", 2, warmup=1
    )
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert seconds["b"] >= 0.01 > seconds["a"]


def test_calls_that_follow_each_other() -> None:
    calls: list[str] = []
    seconds = harness.time_running(
        {"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, "cpu", rounds=2, calls=3
    )
    assert "".join(calls) == "aaaaaabbbbbb" + "aaabbb" * 2  # three to warm up, three to see how long the host takes
    assert seconds["b"] >= 0.01 > seconds["a"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "benchmark", [casts, linear, matmul, peers, roofline, train_benchmark], ids=lambda b: b.__name__
)
def test_without_a_gpu_they_end_with_the_way_out(benchmark: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        benchmark.main([])
    assert e.value.code == 2
    assert "--device=cpu" in capsys.readouterr().err


# ---- matmul.py


def test_matmul(tmp_path: Path) -> None:
    out = tmp_path / "matmul.json"
    assert matmul.main(["--device=cpu", "--rounds=1", f"--out={out}"]) == 0
    rows = results_of(out)
    assert len(rows) == len(matmul.TOY) * len(matmul.GEMMS) * len(matmul.WAYS)
    # torch's own matmul with scales of rows is not there on every CPU; a row says so.
    assert all(
        row["error"] < matmul.bound(row["k"], False) or row["system"] == "torch" for row in rows if "failed" not in row
    )
    ours = {row["scales"] for row in rows if row["system"] == "titanlite" and row["us"] > 0}
    assert ours == {"tensor", "row", "row, after"}


def test_matmul_without_time_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "matmul.json"
    assert matmul.main(["--device=cpu", "--seconds=0.000001", f"--out={out}", "--rounds=1"]) == 1
    content = json.loads(out.read_text())
    assert len(content["left_out"]) == len(matmul.TOY) * len(matmul.GEMMS)
    assert "toy wq, wo output, 32 tokens" in content["left_out"]


@pytest.mark.parametrize("fault", ["a column is not written", "not a number", "doubled"])
def test_a_wrong_product_is_noticed(fault: str) -> None:
    a, b = torch.randn(32, 64), torch.randn(64, 48)
    product = a @ b
    assert matmul.error(product, a, b) < 1e-5
    if fault == "a column is not written":
        product[:, 17] = 0
    elif fault == "not a number":
        product[3, 4] = float("nan")
    else:
        product *= 2
    assert not matmul.error(product, a, b) <= matmul.bound(a.shape[1], True)


# ---- train.py


def test_train(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    given = ["--device=cpu", "--configs=bf16,rowwise", "--modes=eager", "--batches=1", "--windows=1", f"--out={out}"]
    assert train_benchmark.main([*given, "--repeats=1"]) == 0
    bf16, rowwise = results_of(out)
    assert (bf16["config"], rowwise["config"]) == ("bf16", "rowwise")
    assert bf16["speedup_over_bf16"] == 1
    assert rowwise["speedup_over_bf16"] == rowwise["tps"] / bf16["tps"]
    assert rowwise["loss"] != bf16["loss"] == pytest.approx(rowwise["loss"], rel=1e-2)
    assert bf16["mfu_pct"] is None


def test_a_run_that_fails_is_a_row_that_says_why(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    given = ["--device=cpu", "--configs=bf16", "--modes=eager", "--batches=1", f"--out={out}", "--optimizer.lr=fast"]
    assert train_benchmark.main(given) == 1
    (row,) = results_of(out)
    assert row["tps"] is None
    assert "optimizer.lr" in row["failed"][0]


def test_cases_without_time_are_left_out(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    assert train_benchmark.main(["--device=cpu", "--seconds=1", f"--out={out}"]) == 1
    rows = results_of(out)
    assert len(rows) == 16
    assert all(row["failed"][0].startswith("left out: ") for row in rows)


def test_warm_up_is_no_part_of_the_medians() -> None:
    rows = [
        {"tps": tps, "mfu": tps / 10, "step_time_s": 1 / tps, "memory_gib": memory, "loss": loss}
        for tps, memory, loss in [(1, 9, 5), (2, 8, 4), (30, 7, 3), (50, 7, 2), (40, 7, 1)]
    ]
    medians = train_benchmark.measured(rows)
    assert (medians["tps"], medians["mfu_pct"], medians["peak_memory_gib"], medians["loss"]) == (40, 4, 9, 1)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--configs=bf17", "bf17 is not one of"),
        ("--modes=fast", "fast is not one of"),
        ("--batches=0", "whole numbers"),
    ],
)
@pytest.mark.parametrize("benchmark", [peers, train_benchmark], ids=lambda b: b.__name__)
def test_wrong_options(benchmark: Any, given: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        benchmark.main(["--device=cpu", given])
    assert e.value.code == 2
    assert says in capsys.readouterr().err


# ---- peers.py

GIVEN = ["--device=cpu", "--modes=eager", "--steps=8"]


def test_without_the_peer_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(peers, "NEEDED", ("no_such_package",))
    assert peers.main(GIVEN) == 2
    assert (
        "no_such_package: not installed, and there is nothing to compare with: pip install" in capsys.readouterr().out
    )


def test_our_side() -> None:
    args = peers.arguments(GIVEN)
    measurement = peers.measure(peers.Case("titanlite", "tensorwise", False, 2), args, 120)
    assert "failed" not in measurement, measurement
    assert measurement["tps"] > 0
    assert len(measurement["losses"]) == len(measurement["grad_norms"]) == 5
    assert len(measurement["step_times_s"]) == 3


@pytest.mark.skipif(find_spec("torchtitan") is None or find_spec("torchao") is None, reason="needs torchtitan, torchao")
def test_both_compute_the_same(tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    assert peers.main([*GIVEN, "--configs=bf16,tensorwise", f"--out={out}"]) == 0
    ours = [row for row in results_of(out) if row["system"] == "titanlite"]
    assert [row["same_computation"] for row in ours] == [True, True]


def row(system: str, config: str, tps: float, losses: list[float]) -> dict[str, Any]:
    case = peers.Case(system, config, True, 1)._asdict()
    return {**case, "tps": tps, "peak_memory_gib": 1.0, "losses": losses, "grad_norms": [1.0]}


@pytest.mark.parametrize(("loss", "same"), [(2.001, True), (2.01, False), (float("nan"), False)])
def test_speeds_of_different_computations_are_not_compared_in_silence(loss: float, same: bool) -> None:
    rows = [row("titanlite", "bf16", 3.0, [loss]), row(peers.OTHER, "bf16", 2.0, [2.0])]
    peers.compare(rows)
    assert rows[0]["speedup_over_peer"] == 1.5
    assert rows[0]["same_computation"] is same
    said = suite_summary.failures({"peers": rows})
    assert any("their ratio is void" in line for line in said) is not same


def test_who_begins_changes() -> None:
    systems = [case.system for case in peers.turns(peers.arguments([*GIVEN, "--configs=bf16,rowwise"]))]
    assert systems == ["titanlite", peers.OTHER, peers.OTHER, "titanlite"]
