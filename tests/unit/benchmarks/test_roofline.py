"""scripts/benchmarks/roofline.py: its counts against what a layer really does, and its reports, on the CPU."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import casts
import cost
import counted_step
import harness
import pytest
import results
import roofline
import step_floor
import torch
from benchmark_models import FLAVORS
from torch import Tensor, nn

from titanlite.float8 import Float8LinearConfig, convert_to_float8_training
from titanlite.quant.float8 import format, matmul
from titanlite.quant.kernels import reference

pytestmark = pytest.mark.long

GIVEN = ["--device=cpu", "--bf16-tflops=700", "--fp8-tflops=1400", "--bandwidth-gbs=4000"]
AT = cost.Ceilings(700e12, 1400e12, 1400e12, 4000e9)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Bytes per cast and rescaling of a layer on its kernels' path, with the CPU as a device with float8 units."""
    byte_counts: list[int] = []

    def cast(
        x: Tensor, amaxes: Tensor, dtype: Any, by_rows: str, by_columns: str, power_of_2: bool
    ) -> tuple[Tensor, ...]:
        out = reference.cast_with(x, amaxes, dtype, by_rows, by_columns, power_of_2)
        data = sum(t.nbytes for t in out if t.dtype == dtype)
        byte_counts.append(casts.reads(by_rows, by_columns, x.shape[1]) * x.nbytes + data)
        return out

    def rescale(product: Tensor, *arguments: Any) -> Tensor:
        byte_counts.append(2 * product.nbytes)
        return reference.rescale(product, *arguments)

    def scaled_mm(a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, out_dtype: Any, **_: Any) -> Tensor:
        return ((a.float() * scale_a) @ (b.float() * scale_b)).to(out_dtype)

    # torch 2.11's on the CPU takes no scales of rows; what is counted is not in it.
    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library:
        library.impl("cast", cast, "CPU", allow_override=True)
        library.impl("rescale", rescale, "CPU", allow_override=True)
        monkeypatch.setattr(format, "must_emulate", lambda device, target, dtypes, emulate, compiled: emulate)
        monkeypatch.setattr(matmul.kernels, "AVAILABLE", True)
        yield byte_counts


@pytest.mark.parametrize("follow", [False, True])
@pytest.mark.parametrize("recipe", harness.RECIPES)
def test_the_count_of_bytes_is_what_a_layer_moves(
    recipe: str, follow: bool, moved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matmul, "scales_rows_in_matmuls", lambda *_: not follow)
    m, k, n = 32, 64, 48
    layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16)
    convert_to_float8_training(layer, config=Float8LinearConfig.from_recipe_name(recipe))
    x = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True)
    layer(x).backward(torch.randn(m, n, dtype=torch.bfloat16))
    rescaled = sum(gemm.rescale_bytes(follow) for gemm in cost.gemms(recipe, m, k, n))
    assert sum(moved) == cost.cast_bytes(recipe, m, k, n) + rescaled


def test_the_count_by_hand() -> None:
    m, k, n = 8192, 4096, 14336
    assert cost.cast_bytes("tensorwise", m, k, n) == 6 * m * (k + n) + 10 * k * n
    assert cost.cast_bytes("rowwise", m, k, n) == 6 * m * (k + n) + 8 * k * n
    assert cost.cast_bytes("rowwise_with_gw_hp", m, k, n) == 3 * m * (k + n) + 8 * k * n
    assert cost.cast_bytes("bf16", m, k, n) == 0
    assert cost.predict("rowwise", m, k, n, AT).rescales == 0
    prediction = cost.predict("rowwise", m, k, n, AT._replace(scales_follow=True))
    assert prediction.matmuls == pytest.approx(6 * m * k * n / 1400e12)
    assert prediction.rescales == pytest.approx(4 * (m * k + k * n) / 4000e9)
    assert prediction.casts == pytest.approx((6 * m * (k + n) + 8 * k * n) / 4000e9)


def test_a_small_matmul_takes_the_time_of_its_bytes() -> None:
    (gemm, *_) = cost.gemms("bf16", 16, 4096, 4096)
    assert gemm.seconds(AT) == pytest.approx(2 * (16 * 4096 * 2 + 4096 * 4096) / 4000e9)


def test_without_a_gpu_from_given_ceilings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "roofline.json"
    given = [option for option in GIVEN if option != "--device=cpu"]  # nothing is measured: no device is needed
    assert roofline.main([*given, "--m=8192", "--k=512,4096", "--n=512,4096", f"--out={out}"]) == 0
    with out.with_suffix(".csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4
    speed = {(row["config"], row["k"], row["n"]): float(row["predicted_speedup"]) for row in rows}
    assert speed["rowwise", "512", "512"] < 1 < speed["rowwise", "4096", "4096"] < 2
    assert speed["rowwise_with_gw_hp", "4096", "4096"] < speed["rowwise", "4096", "4096"]
    if find_spec("matplotlib"):
        assert out.with_suffix(".png").stat().st_size > 10000
    else:
        assert "pip install matplotlib" in capsys.readouterr().out


def test_ceilings_are_measured(tmp_path: Path) -> None:
    out = tmp_path / "roofline.json"
    assert roofline.main(["--device=cpu", "--fp8-tflops=3", "--k=64", "--n=64", "--rounds=1", f"--out={out}"]) == 0
    ceilings = json.loads(out.read_text())["ceilings"]
    assert ceilings["fp8_tflops"] == ceilings["fp8_full_tflops"] == 3
    assert 0 < ceilings["bf16_tflops"] < 3
    assert ceilings["bandwidth_gbs"] > 0


def result(path: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    results.write(name, rows, path, "cpu", toy=True)
    return path


def test_the_error_of_the_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    size = {"m": 8192, "k": 4096, "n": 4096}
    predicted = roofline.prediction("rowwise", *size.values(), AT)["predicted_speedup"]
    ours = {"system": "titanlite", "config": "rowwise", "kernels": "triton", **size}
    rows = [
        {**ours, "compile": True, "speedup_over_bf16": predicted / 1.1},
        {**ours, "compile": False, "speedup_over_bf16": 1.0},
        {**ours, "compile": True, "failed": "no memory"},
        {**ours, "system": "torchao", "compile": True, "speedup_over_bf16": 1.0},
    ]
    out = tmp_path / "roofline.json"
    linear_file = result(tmp_path / "linear.json", "linear", rows)
    assert roofline.main([*GIVEN, "--k=64", "--n=64", f"--check={linear_file}", f"--out={out}"]) == 0
    (row,) = [row for row in json.loads(out.read_text())["results"] if "error_pct" in row]
    assert row["error_pct"] == pytest.approx(10)
    assert "median 10.0%, at most 10.0%" in capsys.readouterr().out


def step(config: str, compile: bool = True, seconds: float | None = 0.5) -> dict[str, Any]:
    row = {"system": "titanlite", "config": config, "compile": compile, "batch": 2, "layers": 2, "seq_len": 64}
    return {**row, "step_time_s": seconds}


def test_the_floor_of_a_step(tmp_path: Path) -> None:
    out = tmp_path / "roofline.json"
    train = result(tmp_path / "train.json", "train", [step("bf16"), step("rowwise"), step("bf16", False)])
    peers = result(tmp_path / "peers.json", "peers", [step("bf16", seconds=9.0), step("tensorwise", seconds=None)])
    given = [*GIVEN, "--k=64", "--n=64", "--rounds=1", f"--out={out}", f"--train={train}", f"--train={peers}"]
    assert roofline.main(given) == 0
    rows = [row for row in json.loads(out.read_text())["results"] if "step_of_floor" in row]
    assert [row["config"] for row in rows] == ["bf16", "rowwise"]
    for row in rows:
        parts = [f"{part}_s" for part in ("matmul", "attention", "memory", "casts")]
        parts += [f"{part}_again_s" for part in ("matmul", "memory", "casts")]
        assert row["floor_s"] == pytest.approx(sum(row[part] for part in parts))
        assert row["step_of_floor"] == row["floor_s"] / 0.5 > row["step_of_floor_without_recompute"]
    assert rows[0]["casts_s"] == 0 < rows[1]["casts_s"]


def test_the_floor_of_a_step_that_nobody_measured(tmp_path: Path) -> None:
    out = tmp_path / "roofline.json"
    given = [*GIVEN, "--attention-tflops=500", "--layers=2", "--batches=1,3", "--k=64", "--n=64", f"--out={out}"]
    assert roofline.main(given) == 0
    rows = [row for row in json.loads(out.read_text())["results"] if "floor_s" in row]
    assert [(row["batch"], row["config"]) for row in rows] == list(
        itertools.product([1, 3], ("bf16", *harness.RECIPES))
    )
    bf16, rowwise = rows[0], rows[2]
    assert bf16["speedup_over_bf16"] == 1 < rowwise["speedup_over_bf16"] == bf16["floor_s"] / rowwise["floor_s"]
    assert bf16["matmul_s"] == pytest.approx(6 * 8192 * (2 * 218_103_808 + 4096 * 128256) / 700e12)
    assert bf16["attention_s"] == pytest.approx(2 * 7 * 8192 * 8192 * 4096 / 500e12)
    assert rows[4]["floor_tps"] == pytest.approx(3 * 8192 / rows[4]["floor_s"])
    assert "step_of_floor" not in bf16


def test_what_a_step_of_llama_8b_computes() -> None:
    args = FLAVORS["8B-16"]
    once, again = step_floor.step_gemms(args, "rowwise", 8192)
    blocks = 16 * 218_103_808  # weights
    assert sum(2 * g.m * g.k * g.n for g in once) == 6 * 8192 * (blocks + 4096 * 128256)
    assert sum(2 * g.m * g.k * g.n for g in again) == 2 * 8192 * 16 * (4096 * 1024 + 4096 * 4096 + 4096 * 14336)
    assert {g.precision for g in once if 128256 in g[1:4]} == {"bf16"}
    inputs, outputs = 4096 * 3, 4096 * 3 + 1024 * 2 + 14336 * 2  # w2's input is SwiGLU's
    rescaled = 4 * (8192 * (5 * 4096 + 4096 + 14336) + 218_103_808)
    assert step_floor.cast_bytes(args, "rowwise", 8192, True) == 16 * (
        6 * 8192 * (inputs + outputs) + 8 * 218_103_808 + rescaled
    )
    assert step_floor.cast_bytes(args, "rowwise", 8192, False) == step_floor.cast_bytes(args, "rowwise", 8192, True) - (
        16 * rescaled
    )
    assert step_floor.cast_bytes(args, "bf16", 8192, True) == step_floor.cast_again_bytes(args, "bf16", 8192) == 0
    weights = 4096 * 1024 + 4096 * 4096 + 4096 * 14336
    for recipe in ("tensorwise", "rowwise"):
        again = 4 * 8192 * inputs + 3 * weights
        assert step_floor.cast_again_bytes(args, recipe, 8192) == 16 * again
    again = 3 * 8192 * 3 * 4096 + 3 * weights
    assert step_floor.cast_again_bytes(args, "rowwise_with_gw_hp", 8192) == 16 * again
    wide = 8192 * 14336
    (bf16, bf16_again), *others = (step_floor.memory_bytes(args, r, 8192) for r in ("bf16", *harness.RECIPES))
    # Forward 6 bytes, backward 10; in float8 9 (the cast included) and 11, with the product in bf16 5 and 12.
    assert [once - bf16 for once, _ in others] == [16 * wide * more for more in (4, 4, 1)]
    assert [bf16_again - again for _, again in others] == [16 * wide * 6] * 3  # backward makes it


@pytest.mark.parametrize(("option", "says"), [("--check", "one of linear"), ("--train", "one of train or peers")])
def test_files_of_another_kind(option: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = result(tmp_path / "casts.json", "casts", [])
    for file, message in ((other, says), (tmp_path / "none.json", "No such file")):
        with pytest.raises(SystemExit) as e:
            roofline.main([*GIVEN, f"{option}={file}"])
        assert e.value.code == 2
        assert message in capsys.readouterr().err


def test_a_step_from_counts_differs_from_its_peer_by_the_bytes_of_its_blocks() -> None:
    given = {"config": "tensorwise", "ac": "op", "tokens": 8192}
    counts = [
        {**given, "system": "titanlite", "mb": 4000.0, "sectors_mb": 5000.0},
        {**given, "system": "torchao", "mb": 8000.0, "sectors_mb": 7000.0},
        {**given, "system": "titanlite", "config": "bf16", "mb": 1000.0, "sectors_mb": 1000.0},
    ]
    ours, peer, bf16 = counted_step.with_ratios([counted_step.predicted(row, 16, AT, 500e12) for row in counts])
    assert (ours["block_s"], peer["block_s"]) == (pytest.approx(16 * 5e9 / 4e12), pytest.approx(16 * 8e9 / 4e12))
    assert peer["step_s"] - ours["step_s"] == pytest.approx(16 * 3e9 / 4e12)
    assert ours["over_peer"] == pytest.approx(peer["step_s"] / ours["step_s"])
    assert ours["over_bf16"] == pytest.approx(bf16["step_s"] / ours["step_s"])
    assert bf16["over_peer"] is None
