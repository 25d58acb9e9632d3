"""scripts/benchmarks/data_throughput.py writes what docs/benchmarks expects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_throughput
import pytest

pytestmark = pytest.mark.long


def write_rows(file: Path, rates: list[Any]) -> None:
    file.write_text("".join(json.dumps({"step": n, "tps": rate}) + "\n" for n, rate in enumerate(rates)))


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, output = tmp_path / "metrics.jsonl", tmp_path / "docs" / "data_throughput.json"
    write_rows(metrics, [1.0, None, 2000.0, 4000.0, 3000.0])
    arguments = ["--window_s", "0.05", "--metrics", str(metrics), "--output", str(output)]
    assert data_throughput.main(arguments) == 0
    report = json.loads(output.read_text())
    assert set(report) == {"name", "date", "commit", "device", "torch", "triton", "command", "results"}
    assert report["name"] == "data_throughput"
    (entry,) = report["results"]
    assert (entry["system"], entry["config"], entry["run_tps"]) == ("titanlite", "pystdlib", 3000.0)
    assert entry["tokens_per_s"] > 20 * 4000  # the debug run consumes under 4000 on two cores
    assert entry["ratio"] == pytest.approx(entry["tokens_per_s"] / 3000, rel=0.01)
    assert "x the run's 3,000" in capsys.readouterr().out


@pytest.mark.parametrize("file", ["one_row.jsonl", "gone.jsonl"])
def test_run_without_steady_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str) -> None:
    write_rows(tmp_path / "one_row.jsonl", [1.0])
    assert data_throughput.main(["--metrics", str(tmp_path / file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("data_throughput.py: --metrics")
    assert error.count("\n") == 1
