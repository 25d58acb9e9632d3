"""scripts/benchmarks/linear.py, at toy size on the CPU."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import linear
import pytest
import torch

pytestmark = pytest.mark.long

EAGER = ["--device=cpu", "--modes=eager", "--rounds=1"]


def test_eager(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    assert linear.main([*EAGER, f"--out={out}"]) == 0
    content = json.loads(out.read_text())
    assert content["toy"] is True
    rows = content["results"]
    systems = {(row["system"], row["config"], row["kernels"], row["kept"]) for row in rows}
    ours = {("titanlite", r, by, kept) for r in linear.RECIPES for by in ("triton", "inductor") for kept in (0, 1)}
    expected = ours | {("torch", "bf16", None, False)}
    if find_spec("torchao"):
        expected |= {("torchao", recipe, None, False) for recipe in linear.RECIPES}
    if find_spec("triton"):
        assert systems == expected
    assert {(row["m"], row["k"], row["n"]) for row in rows} == {(32, 64, 64), (32, 64, 160)}
    for row in rows:
        if "failed" not in row:
            assert row["sqnr_db"] >= 40
            assert row["config"] == "bf16" or 15 < row["sqnr_bf16_db"] < 40
            assert row["speedup_over_bf16"] > 0


@pytest.mark.slow
def test_compiled(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    given = ["--device=cpu", "--modes=compile", "--recipes=rowwise", "--kn=64x64", "--rounds=1", f"--out={out}"]
    assert linear.main(given) == 0
    rows = json.loads(out.read_text())["results"]
    assert all(row["compile"] for row in rows)
    assert not [row for row in rows if "failed" in row]


def test_kept_copies_are_kept() -> None:
    data = linear.data_of(32, 64, 48, "cpu")
    for kept in (True, False):
        system = linear.System("titanlite", "rowwise", "inductor", False, kept)
        layer: Any = linear.layer_of(system, data.w, "cpu")
        step = linear.step_of(layer, data, False, kept)
        step()
        step()  # in which it shows that a copy is used again
        before = dict(layer.copies.copies)
        step()
        assert len(before) == (2 if kept else 0)
        assert all(layer.copies.copies[key] is copy for key, copy in before.items())


@pytest.mark.parametrize("fault", ["the output", "a gradient"])
def test_a_wrong_layer_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = linear.step_of

    def broken(layer: Any, data: Any, compile: bool, kept: bool) -> Any:
        step = real(layer, data, compile, kept)
        at = 0 if fault == "the output" else 2
        emulated = not hasattr(layer, "config") or layer.config.emulate
        return step if emulated else lambda: tuple(t * 1.05 if i == at else t for i, t in enumerate(step()))

    monkeypatch.setattr(linear, "step_of", broken)
    out = tmp_path / "linear.json"
    assert linear.main([*EAGER, "--recipes=tensorwise", "--kn=64x64", f"--out={out}"]) == 1
    rows = [row for row in json.loads(out.read_text())["results"] if row["system"] == "titanlite"]
    assert all("wrong: 26.0 dB" in row["failed"] for row in rows if row["kernels"] == "inductor")


def test_sqnr() -> None:
    one = torch.ones(4)
    assert linear.sqnr((one,), (one,)) == 200
    assert linear.sqnr((one * 1.01, one), (one, one)) == pytest.approx(40, abs=0.01)
    assert math.isnan(linear.sqnr((one * float("nan"),), (one,)))


def test_without_time_it_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "linear.json"
    assert linear.main(["--device=cpu", "--seconds=0.000001", f"--out={out}"]) == 1
    assert "32 x 64 x 64 rowwise, compile" in json.loads(out.read_text())["left_out"]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--kn=64", "must be two multiples of 16"),
        ("--kn=64x40", "must be two multiples of 16"),
        ("--m=0", "whole numbers from 1"),
        ("--recipes=mx", "mx is not one of rowwise"),
        ("--modes=jit", "jit is not one of compile"),
    ],
)
def test_wrong_options(given: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        linear.main(["--device=cpu", given])
    assert e.value.code == 2
    assert says in capsys.readouterr().err
