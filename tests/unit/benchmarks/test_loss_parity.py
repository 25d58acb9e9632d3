"""scripts/benchmarks/loss_parity.py: what it compares, and that it goes on where time ended."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import loss_parity
import pytest

pytestmark = pytest.mark.long


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The runs that were made, of which each has losses of its own."""
    made: list[tuple[str, int]] = []

    def train(config: str, seed: int, options: list[str]) -> list[float]:
        made.append((config, seed))
        time.sleep(0.2)
        return [4.0, 2.0 + seed + 0.01 * seed**2 * (config != "bf16")]

    monkeypatch.setattr(loss_parity, "train", train)
    return made


def run(monkeypatch: pytest.MonkeyPatch, *given: object) -> int:
    monkeypatch.setattr("sys.argv", ["loss_parity.py", *map(str, given)])
    return loss_parity.main()


def test_without_time_nothing_is_begun_and_a_later_call_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run(monkeypatch, "--seeds=2", "--last=1", "--seconds=0.3", f"--output={first}") == 1
    assert runs == [("bf16", 1)]
    assert "left out, no time: seed 1, float32; seed 1, tensorwise" in capsys.readouterr().out
    assert run(monkeypatch, "--seeds=2", "--last=1", f"--resume={first}", f"--output={second}") == 0
    assert len(runs) == len(set(runs)) == 2 * len(loss_parity.CONFIGS)
    rows = {row["config"]: row for row in json.loads(second.read_text())["results"]}
    assert rows["bf16"]["final_loss"] == [3.0, 4.0]
    assert rows["rowwise"]["difference_pct"] == pytest.approx(100 * (0.01 / 3 + 0.04 / 4) / 2)
    low, high = rows["rowwise"]["interval_95_pct"]
    spread = abs(0.04 / 4 - 0.01 / 3) / math.sqrt(2)
    assert high - low == pytest.approx(2 * 12.706 * 100 * spread / math.sqrt(2))


def test_runs_of_other_options_are_not_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[tuple[str, int]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "result.json"
    assert run(monkeypatch, "--seeds=2", "--last=1", f"--output={out}") == 0
    with pytest.raises(SystemExit) as e:
        run(monkeypatch, "--seeds=2", "--last=1", f"--resume={out}", "--training.steps=7")
    assert e.value.code == 2
    assert "--training.steps=7" in capsys.readouterr().err
