"""The kernels that cast by group: against the plain operations, in Triton's interpreter or on a GPU; by the bytes they
move; and compiled ahead of time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.support.compiler import compiles
from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import DEVICE, Traffic, matrix
from tests.unit.quant.test_grouped_matmul import SIZES, K, operands, step
from titanlite.quant.float8.numerics import amax_to_scale
from titanlite.quant.format import Operand, Use
from titanlite.quant.groups import GroupedFormat, Groups
from titanlite.quant.kernels import groups as float8
from titanlite.quant.mx import kernels as mx
from titanlite.quant.recipes import grouped_format

E4M3 = torch.float8_e4m3fn
BY_COLUMNS = Use("input", 0)
CASES = {**SIZES, "many": [7] * 40, "long": [0, 131, 2, 300]}


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with exact_conversions():
        yield


def adversarial(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Rows of very different magnitudes, and what casts get wrong."""
    torch.manual_seed(rows)
    x = matrix(rows, columns, torch.float32).clamp(-60000, 60000)
    bad = [math.nan, math.inf, -math.inf, -0.0, 0.0, 1e-40, -1e-40, 3e38, 1e-12, 448.0]
    for i in range(min(rows, columns)):
        x[(5 * i) % rows, i] = bad[i % len(bad)]
    x[:, 1], x[:, 2] = 0, -0.0
    if rows:
        x[rows // 2, 3:] = 1e-40
    return x.to(dtype)


def same(mine: Tensor, plain: Tensor) -> None:
    mine = mine.cpu()
    assert (mine.shape, mine.dtype, mine.is_contiguous()) == (plain.shape, plain.dtype, True)
    bits = torch.uint8 if plain.itemsize == 1 else torch.int32
    equal = (mine.view(bits) == plain.view(bits)) | (mine.float().isnan() & plain.float().isnan())
    assert equal.all(), f"{(~equal).sum()} of {equal.numel()} differ"


def plain_columns(format: GroupedFormat, x: Tensor, groups: Groups) -> Operand:
    return format.emulated.cast_columns(x, groups, BY_COLUMNS)


def by_kernels(x: Tensor, groups: Groups, recipe: str) -> tuple[Tensor, Tensor]:
    """The cast of columns by the kernels alone."""
    x, row_of, group_of = (t.to(DEVICE) for t in (x, groups.row_of, groups.group_of))
    if recipe == "mxfp8":
        return mx.cast_columns_by_kernel(x, row_of, "rceil")
    scale = amax_to_scale(float8.amaxes_by_kernel(x, row_of, group_of, groups.count), E4M3, True)
    return float8.cast_by_kernel(x, row_of, group_of, scale, E4M3), scale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8"])
def test_columns_of_groups_are_the_plain_operations(recipe: str, sizes: list[int], dtype: torch.dtype) -> None:
    format = grouped_format(recipe)
    x = adversarial(sum(sizes), 48, dtype)
    # The last three rows, if there are any, are after the last group.
    offsets = torch.tensor(sizes).cumsum(0).clamp(max=max(sum(sizes) - 3, 0)).int()
    groups = Groups(offsets, len(x), format.multiple)
    for mine, plain in zip(by_kernels(x, groups, recipe), plain_columns(format, x, groups), strict=True):
        assert plain is not None
        same(mine, plain)


@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8"])
def test_slices_and_transposes(recipe: str) -> None:
    format, whole = grouped_format(recipe), adversarial(96, 160, torch.bfloat16)
    for x in (whole[:, 32:80], whole[::2], whole.t()):
        groups = Groups(torch.tensor([5, len(x)], dtype=torch.int32), len(x), format.multiple)
        for mine, plain in zip(by_kernels(x, groups, recipe), plain_columns(format, x, groups), strict=True):
            assert plain is not None
            same(mine, plain)


@pytest.mark.parametrize("mode", ["rceil", "floor"])
@pytest.mark.parametrize("rows", [0, 1, 130])
def test_rows_in_blocks_are_the_plain_operation(mode: str, rows: int) -> None:
    x = adversarial(rows, 160, torch.bfloat16)
    for mine, plain in zip(mx.cast_rows_by_kernel(x.to(DEVICE), mode), mx.cast_rows(x, mode), strict=True):
        same(mine, plain)


def interpreted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the kernels cast for the formats, and say which."""
    calls: list[str] = []

    def say(name: str, kernel: Any) -> Any:
        def cast(*args: Any) -> Any:
            calls.append(name)
            return kernel(*args)

        return cast

    monkeypatch.setattr("titanlite.quant.mx.kernels.cast_rows", say("rows", mx.cast_rows_by_kernel))
    monkeypatch.setattr("titanlite.quant.mx.kernels.cast_columns_of_groups", say("columns", mx.cast_columns_by_kernel))
    monkeypatch.setattr("titanlite.quant.float8.format.amaxes_of_groups", say("amaxes", float8.amaxes_by_kernel))
    monkeypatch.setattr("titanlite.quant.float8.format.cast_columns_of_groups", say("columns", float8.cast_by_kernel))
    return calls


@pytest.mark.skipif(DEVICE == "cuda", reason="casts for units on the CPU")
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8"])
def test_matmuls_with_kernels_give_the_same(recipe: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The matmul of float8 is emulated here: the units would write other results than float32 by their rounding."""
    import dataclasses

    a, w, offsets, grad = operands(sizes, torch.bfloat16)
    plain = step(a, w, offsets, grad, recipe)
    calls, native = interpreted(monkeypatch), dataclasses.replace(grouped_format(recipe), target="sm_90")  # type: ignore[type-var]
    kind = type(native)
    monkeypatch.setattr(kind, "for_groups", lambda self, device, dtype: self)
    for name in ("multiply_rows", "multiply_columns"):
        monkeypatch.setattr(kind, name, getattr(GroupedFormat, name))
    for mine, other in zip(step(a, w, offsets, grad, native), plain, strict=True):  # type: ignore[arg-type]
        assert torch.equal(mine, other)
    assert calls.count("columns") == 3  # rows, their gradient, and the weight for the gradient of the rows


@pytest.mark.parametrize("recipe", ["float8_rowwise", "mxfp8"])
def test_shapes_are_known_without_data(recipe: str) -> None:
    a, _, offsets, _ = operands(SIZES["odd"])
    groups = Groups(offsets, len(a), grouped_format(recipe).multiple)
    places, check = (groups.row_of, groups.group_of), torch.library.opcheck
    if recipe == "mxfp8":
        check(torch.ops.titanlite_mx.cast_rows.default, (a.detach(), "rceil"))
        check(torch.ops.titanlite_mx.cast_columns_of_groups.default, (a.detach(), groups.row_of, "rceil"))
        return
    check(torch.ops.titanlite_quant.amaxes_of_groups.default, (a.detach(), *places, groups.count))
    scale = torch.ones(groups.count, K)
    check(torch.ops.titanlite_quant.cast_columns_of_groups.default, (a.detach(), *places, scale, E4M3))


@pytest.mark.skipif(DEVICE == "cuda", reason="counted in the interpreter")
@pytest.mark.parametrize(("recipe", "reads"), [("float8_rowwise", 2), ("mxfp8", 1)])
def test_bytes_moved(recipe: str, reads: int) -> None:
    """Each element is read once for each pass, without a copy that is filled up, and written once. Beside it are read
    the place of each row, for each tile across, and the scale of each column for each unit of 16 rows."""
    sizes = [200, 0, 312]
    x = matrix(sum(sizes), 128)
    groups = Groups(torch.tensor(sizes).cumsum(0).int(), len(x), grouped_format(recipe).multiple)
    with Traffic() as traffic:
        data, _ = by_kernels(x, groups, recipe)
    beside = (4 / 16 if recipe == "float8_rowwise" else 0) + 0.15
    assert reads * 2 * x.numel() <= traffic.read <= (reads * 2 + beside) * x.numel()
    assert data.numel() <= traffic.written <= data.numel() * 33 / 32


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_kernels_compile(target: str) -> None:
    """Without spills, with accesses of 16 bytes, and with offsets of 64 bits."""
    compiles(Path(__file__).with_name("compile_group_kernels.py"), target)
