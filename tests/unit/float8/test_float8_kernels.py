"""The Triton kernels: against the plain formulas, on a GPU or else in Triton's interpreter, as conftest.py says; by
the bytes they move; and compiled ahead of time for the GPUs they are meant for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton")
from triton.runtime import interpreter

from tests.support.compiler import compiles
from tests.unit.float8.interpreted import exact_conversions
from titanlite.quant.kernels import launch, outputs, reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE, TENSOR, VECTOR = "none", "tensor", "vector"
LAYOUTS = [(r, c) for r in (NONE, TENSOR, VECTOR) for c in (NONE, TENSOR, VECTOR) if (r, c) != (NONE, NONE)]
each_layout = pytest.mark.parametrize(("by_rows", "by_columns"), LAYOUTS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz], ids=str)


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


def check(x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool) -> None:
    results = [t.cpu() for t in launch.cast(x.to(DEVICE), dtype, by_rows, by_columns, power_of_2)]
    meaningless = [results[1].isnan(), None, results[3].t().isnan(), None] if dtype is torch.int8 else 4 * [None]
    expected = reference.cast(x, dtype, by_rows, by_columns, power_of_2)
    for a, b, without in zip(results, expected, meaningless, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (b.shape, b.dtype, True)
        bits = torch.uint8 if a.itemsize == 1 else torch.int32
        same = (a.view(bits) == b.view(bits)) | (a.float().isnan() & b.float().isnan())
        same = same if without is None or not a.numel() else same | without
        assert same.all(), f"{(~same).sum()} of {same.numel()} differ"


def matrix(m: int, n: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rows of very different magnitudes."""
    return (torch.randn(m, n) * torch.exp(8 * torch.randn(m, 1))).to(dtype)


@each_layout
@each_dtype
@pytest.mark.parametrize("power_of_2", [False, True])
def test_casts_are_the_formulas(by_rows: str, by_columns: str, dtype: torch.dtype, power_of_2: bool) -> None:
    torch.manual_seed(0)
    for shape, source in [((130, 272), torch.bfloat16), ((1, 16), torch.float32), ((67, 33), torch.float16)]:
        check(matrix(*shape).clamp(-60000, 60000).to(source), dtype, by_rows, by_columns, power_of_2)


@each_layout
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nothing_finite_is_made_of_nans_and_infinities(by_rows: str, by_columns: str, bad: float) -> None:
    torch.manual_seed(0)
    x = matrix(40, 48)
    x[3], x[:, 5] = 0, 0
    x[7, 11] = bad
    check(x, torch.float8_e4m3fn, by_rows, by_columns, True)


@each_layout
def test_slices_and_transposes(by_rows: str, by_columns: str) -> None:
    torch.manual_seed(0)
    whole = matrix(96, 160)
    for x in (whole[:, 32:80], whole[::2], whole.t()):
        check(x, torch.float8_e4m3fn, by_rows, by_columns, True)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=True), min_size=4, max_size=24), st.sampled_from(LAYOUTS), st.booleans())
def test_any_float(values: list[float], layout: tuple[str, str], power_of_2: bool) -> None:
    x = torch.tensor(values[: len(values) // 4 * 4]).view(4, -1)
    check(x, torch.float8_e4m3fn, *layout, power_of_2)


@each_dtype
def test_powers_of_two_turn_where_the_formula_turns(dtype: torch.dtype) -> None:
    """At amaxes of which fp8_max is a power of two, and at their neighbours."""
    mantissa = torch.tensor([[torch.finfo(dtype).max]]).frexp().mantissa
    turns = (mantissa * torch.exp2(torch.arange(-149.0, 128.0)).view(-1, 1)).clamp(max=torch.finfo(torch.float32).max)
    up, down = torch.tensor(torch.inf), torch.tensor(0.0)
    amaxes = torch.cat([turns, turns.nextafter(up), turns.nextafter(down), torch.tensor([[0.0], [1e-12]])])
    check(amaxes.expand(-1, 16).contiguous(), dtype, VECTOR, NONE, True)


def test_a_row_too_long_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LONGEST_ROW", 64)
    check(matrix(3, 100), torch.float8_e4m3fn, VECTOR, NONE, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("row_shape", [(70, 1), ()], ids=str)
@pytest.mark.parametrize("column_shape", [(1, 300), ()], ids=str)
def test_rescaling(dtype: torch.dtype, row_shape: tuple[int, ...], column_shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    product = torch.randn(70, 300).to(dtype)
    rows, columns = torch.rand(row_shape) * 1000, torch.rand(column_shape) * 1e-3
    output = launch.rescale(product.to(DEVICE), rows.to(DEVICE), columns.to(DEVICE), dtype).cpu()
    assert output.dtype == dtype
    assert torch.equal(output, reference.rescale(product, rows, columns, dtype))


# ---- bytes moved


class Traffic:
    """The bytes that interpreted kernels read and write; what atomics do is counted apart."""

    def __init__(self) -> None:
        self.read = self.written = 0

    def __enter__(self) -> Traffic:
        builder = interpreter.InterpreterBuilder
        load, store = builder.create_masked_load, builder.create_masked_store

        def counted_load(this: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
            self.read += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return load(this, ptrs, mask, *args)

        def counted_store(this: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
            self.written += int(mask.data.sum()) * ptrs.get_element_ty().primitive_bitwidth // 8
            return store(this, ptrs, value, mask, *args)

        self._patches = [
            patch.object(builder, "create_masked_load", counted_load),
            patch.object(builder, "create_masked_store", counted_store),
        ]
        for p in self._patches:
            p.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for p in self._patches:
            p.stop()


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize(
    ("by_rows", "by_columns", "read", "written"),
    [
        (VECTOR, NONE, 2, 1),  # in one pass
        (TENSOR, NONE, 4, 1),  # once for the amax, once for the cast
        (TENSOR, TENSOR, 4, 2),
        (VECTOR, VECTOR, 4, 2),
        (VECTOR, TENSOR, 4, 2),
    ],
)
def test_bytes_moved_per_element(by_rows: str, by_columns: str, read: int, written: int) -> None:
    x = matrix(256, 512)
    with Traffic() as traffic:
        launch.cast(x, torch.float8_e4m3fn, by_rows, by_columns, True)
    # Beside it, amaxes and scales: 4 bytes for a row or column of a tile.
    assert read <= traffic.read / x.numel() <= read * 1.05
    assert written <= traffic.written / x.numel() <= written * 1.05


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [1.0, math.nan, math.inf])
def test_a_cast_with_an_agreed_amax_reads_once(dtype: torch.dtype, bad: float) -> None:
    x = matrix(131, 272, dtype)
    agreed = (x.float().abs().max() * 3 * bad).reshape(1).view(torch.int32)
    args = (x, agreed, torch.float8_e4m3fn, TENSOR, NONE, False)
    with Traffic() as traffic:
        data, scale, *_ = launch.cast_with(*args)
    plain, plain_scale, *_ = reference.cast_with(*args)
    assert torch.equal(data.float().nan_to_num(-1), plain.float().nan_to_num(-1))
    assert torch.equal(scale.nan_to_num(-1), plain_scale.nan_to_num(-1))
    assert dtype.itemsize <= traffic.read / x.numel() <= dtype.itemsize * 1.05
    assert 1 <= traffic.written / x.numel() <= 1.05


# ---- compiled for GPUs that are not here

TARGETS = ("sm_89", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize(
    "target", [t if t in ("sm_90", "gfx942") else pytest.param(t, marks=pytest.mark.long) for t in TARGETS]
)
def test_every_kernel_compiles(target: str) -> None:
    compiles(Path(__file__).with_name("compile_kernels.py"), target)
