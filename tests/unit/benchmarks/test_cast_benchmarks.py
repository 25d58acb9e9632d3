"""scripts/benchmarks/casts.py, at toy size on the CPU: in Triton's interpreter, where it is installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import casts
import cost
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import cast_sweep

from tests.unit.float8.interpreted import exact_conversions
from titanlite.quant.kernels import launch, reference

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the benchmark itself is run"),
]


@pytest.fixture(autouse=True)
def real_kernels() -> Iterator[None]:
    """The operators are the Triton kernels on the CPU, too."""
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library, exact_conversions():
        library.impl("amaxes", launch.amaxes, "CPU", allow_override=True)
        library.impl("cast", launch.cast_with, "CPU", allow_override=True)
        library.impl("swiglu_backward", launch.swiglu_backward, "CPU", allow_override=True)
        library.impl("rescale", launch.rescale, "CPU", allow_override=True)
        yield


def test_all_kernels(tmp_path: Path) -> None:
    out = tmp_path / "casts.json"
    assert casts.main(["--device=cpu", "--rounds=1", "--no-against", f"--out={out}"]) == 0
    content = json.loads(out.read_text())
    assert content["toy"] is True
    rows = content["results"]
    assert len(rows) == 2 * 17
    assert {row["system"] for row in rows} == {"titanlite"}
    assert {row["mismatch"] for row in rows if "swiglu" not in row["kernel"]} == {0.0}
    for row in rows:
        assert row["of_copy"] == pytest.approx(row["gbps"] / row["copy_gbps"])
        assert row["gbps"] == pytest.approx(row["bytes"] / row["us"] / 1e3)


@pytest.mark.parametrize(
    ("kernel", "scales", "bytes_per_element"),
    [
        ("cast rows", "vector", 3),
        ("cast columns", "vector", 5),
        ("cast both", "vector", 6),
        ("cast rows", "tensor", 5),
        ("cast both", "tensor", 6),
    ],
)
def test_the_bytes_are_those_of_the_design(kernel: str, scales: str, bytes_per_element: int) -> None:
    x = torch.randn(32, 64).bfloat16()
    case = casts.Kernel(kernel, scales, casts.E4M3)
    outputs = reference.cast(x, casts.E4M3, *case.layouts(), True)
    assert casts.bytes_per_element(*case.layouts(), 64) == bytes_per_element
    of_scales = sum(out.nbytes for out in outputs if out.dtype == torch.float32)
    assert casts.moved(case, x, outputs) == bytes_per_element * x.numel() + of_scales


@pytest.mark.parametrize("case", casts.SWIGLUS, ids=lambda k: f"{k.kernel} {k.scales}")
def test_the_bytes_of_swiglu(case: casts.Kernel) -> None:
    (i, _) = casts.inputs_of(32, 64, "cpu")
    outputs = casts.plain(case, i)
    beside = sum(out.nbytes for out in outputs if out.dtype in (torch.float32, torch.int32))
    recipe = {"vector": "rowwise", "tensor": "tensorwise"}[case.scales]
    per_element = cost.swiglu_bytes(recipe, 64)[case.kernel == "swiglu backward"]
    assert casts.moved(case, i.x, outputs) == per_element * i.x.numel() + beside


@pytest.mark.parametrize("system", ["plain", "torchao_cast"])
@pytest.mark.parametrize("kernel", casts.CASTS[:6], ids=lambda k: f"{k.kernel} {k.scales}")
def test_the_peers_compute_the_same(system: str, kernel: casts.Kernel) -> None:
    if system == "torchao_cast":
        pytest.importorskip("torchao")
    (i, _) = casts.inputs_of(32, 64, "cpu")
    expected = reference.cast(i.x, kernel.dtype, *kernel.layouts(), kernel.scales == "vector")
    assert casts.mismatch(getattr(casts, system)(kernel, i), expected) <= casts.BOUNDS[casts.TORCHAO]


@pytest.mark.parametrize("fault", ["a number", "a scale", "the layout"])
def test_a_wrong_kernel_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        data, scale, transposed, its_scale = reference.cast(x, *arguments)
        if fault == "a number" and transposed.numel():
            transposed.view(torch.uint8)[-1, -1] ^= 1
        if fault == "a scale" and its_scale.numel():
            its_scale.view(-1)[-1] *= 1 + 2**-23
        return data, scale, transposed.t().contiguous().t() if fault == "the layout" else transposed, its_scale

    monkeypatch.setattr(casts.kernels, "cast", wrong)
    out = tmp_path / "casts.json"
    assert casts.main(["--device=cpu", "--rounds=1", "--no-against", f"--out={out}"]) == 1
    rows = [row for row in json.loads(out.read_text())["results"] if row["kernel"] == "cast both"]
    assert all(row["failed"].startswith("wrong: ") for row in rows)


def test_without_time_it_says_what_it_left_out(tmp_path: Path) -> None:
    out = tmp_path / "casts.json"
    assert casts.main(["--device=cpu", "--seconds=0.000001", f"--out={out}"]) == 1
    assert len(json.loads(out.read_text())["left_out"]) == 2 * 2 * 17


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(casts, "shapes", lambda args: [(32, 64)])
    monkeypatch.setattr(cast_sweep, "shapes", lambda args: [(32, 64)])
    before = launch.CAST_TILE
    out = tmp_path / "sweep.json"
    assert casts.main(["--device=cpu", "--rounds=1", "--sweep", f"--out={out}"]) == 0
    rows = json.loads(out.read_text())["results"]
    assert [row["constant"] for row in rows if row.get("best")] == [c.name for c in cast_sweep.CONSTANTS]
    said = capsys.readouterr().out
    assert "CAST_TILE = Tile(" in said
    assert "ROW_PER_WARP = " in said
    assert before == launch.CAST_TILE


def test_a_tile_that_is_wrong_or_cannot_be_compiled_drops_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = cast_sweep.run

    def run(kernel: casts.Kernel, i: casts.Input) -> tuple[Any, ...]:
        if launch.RESCALE_TILE.rows == 8:
            raise RuntimeError("out of resource")
        (out,) = real(kernel, i)
        return (out * 2 if launch.RESCALE_TILE.rows == 16 else out,)

    (constant,) = (c for c in cast_sweep.CONSTANTS if c.name == "RESCALE_TILE")
    monkeypatch.setattr(cast_sweep, "run", run)
    monkeypatch.setattr(cast_sweep, "CONSTANTS", [constant])
    monkeypatch.setattr(cast_sweep, "shapes", lambda args: [(16, 32)])
    monkeypatch.setattr(cast_sweep, "_TOYS", 4)
    out = tmp_path / "sweep.json"
    assert casts.main(["--device=cpu", "--rounds=1", "--sweep", f"--out={out}"]) == 1
    rows = {row["value"]: row for row in json.loads(out.read_text())["results"]}
    assert rows["(8, 1024, 4)"]["failed"] == "RuntimeError: out of resource"
    assert rows["(16, 256, 4)"]["failed"].startswith("wrong: ")
    assert rows["(32, 256, 4)"]["best"] is True


def test_a_sweep_needs_the_kernels(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(SystemExit) as e:
        casts.main(["--device=cpu", "--sweep"])
    assert e.value.code == 2
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err
