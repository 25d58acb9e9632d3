"""The grouped matmul of GPUs in mxfp8: the order of its scales against torchao's, its operands against PyTorch's
checks, and its results, computed on the CPU from what the units would read, against the emulated ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.unit.float8.test_float8_oracle import sqnr
from titanlite.quant import devices
from titanlite.quant.format import Use
from titanlite.quant.grouped_mm import quantized_grouped_mm
from titanlite.quant.groups import Groups
from titanlite.quant.mx import grouped
from titanlite.quant.mx.format import MXFormat
from titanlite.quant.mx.numerics import BLOCK, in_rows, swizzled

SIZES = {
    "odd": [3, 17, 300, 1],
    "empty": [0, 133, 0, 7],
    "all in one": [0, 0, 270, 0],
    "no tokens": [0, 0, 0, 0],
    "whole tiles": [128, 256, 0, 128],
}
each_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
NATIVE = MXFormat(target="sm_100")


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).int()


def bytes_of(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randint(1, 255, shape, dtype=torch.uint8)


def operands(sizes: list[int], k: int, m: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the weight of each group, offsets, and the gradient of the output; and two rows after the last group."""
    torch.manual_seed(0)
    a, w, grad = torch.randn(sum(sizes) + 2, k), torch.randn(len(sizes), m, k), torch.randn(sum(sizes) + 2, m)
    a, w, grad = a.bfloat16(), w.bfloat16(), grad.bfloat16()
    return a.requires_grad_(), w.requires_grad_(), ends_of(sizes), grad


def step(sizes: list[int], k: int, m: int, format: MXFormat) -> list[Tensor]:
    """The output, and the gradients of rows and weights."""
    a, w, offsets, grad = operands(sizes, k, m)
    out = quantized_grouped_mm(a, w.transpose(1, 2), offsets, format)
    grad_a, grad_w = torch.autograd.grad(out, (a, w), grad)
    return [out[: sum(sizes)], grad_a[: sum(sizes)], grad_w]


class Calls(TorchDispatchMode):
    """The operands of each grouped matmul."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.titanlite_mx.multiply_groups.default:
            self.operands.append(args)
        return func(*args, **(kwargs or {}))


# ---- the order of scales


@each_size
@pytest.mark.parametrize("blocks", [4, 12])
def test_scales_of_rows_are_torchaos(sizes: list[int], blocks: int) -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    from torchao.prototype.moe_training.kernels.mxfp8.quant import torch_to_blocked_2d_M_groups

    exponents, offsets = bytes_of(sum(sizes), blocks), ends_of(sizes)
    theirs, begins = torch_to_blocked_2d_M_groups(exponents, offsets)
    mine, used = grouped.scales_of_rows(exponents, offsets), int(begins[-1]) * blocks
    assert mine.shape[0] >= sum(sizes)
    assert torch.equal(mine.flatten()[:used], theirs.flatten()[:used])


@each_size
@pytest.mark.parametrize("features", [128, 200, 288])
def test_scales_of_columns_are_torchaos(sizes: list[int], features: int) -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    from torchao.prototype.moe_training.kernels.mxfp8.quant import torch_to_blocked_2d_K_groups

    groups = NATIVE.groups(ends_of(sizes), sum(sizes))
    exponents = bytes_of(features, groups.padded(torch.zeros(sum(sizes), 1)).shape[0] // BLOCK)
    theirs, begins = torch_to_blocked_2d_K_groups(exponents, groups.ends // BLOCK)
    mine, used = grouped.scales_of_columns(exponents, groups), int(begins[-1]) * theirs.shape[0]
    assert mine.shape == (theirs.shape[0], exponents.shape[1])
    assert torch.equal(mine.flatten()[:used], theirs.flatten()[:used])


@pytest.mark.parametrize(("rows", "blocks"), [(96, 2), (128, 4), (300, 5)])
def test_scales_of_matrices_are_torchaos(rows: int, blocks: int) -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    from torchao.prototype.moe_training.kernels.mxfp8.quant import torch_to_blocked_per_group_3d

    exponents = bytes_of(3, rows, blocks)
    mine = swizzled(exponents)
    assert torch.equal(mine, torch_to_blocked_per_group_3d(exponents))
    assert torch.equal(in_rows(mine[1], rows, blocks), exponents[1])


def test_every_group_of_columns_has_rows_and_whole_tiles() -> None:
    """The units write nothing for a group without rows."""
    groups = NATIVE.groups(ends_of([0, 129, 0]), 129)
    assert groups.ends.tolist() == [128, 384, 512]
    assert Groups(ends_of([0, 129, 0]), 129, 128).ends.tolist() == [0, 256, 256]


# ---- matmuls


@each_size
@pytest.mark.parametrize(("k", "m"), [(64, 96), (160, 288)])
def test_products_are_the_emulated_ones(sizes: list[int], k: int, m: int) -> None:
    assert NATIVE.for_groups(torch.device("cpu"), torch.bfloat16) is NATIVE
    for mine, other in zip(step(sizes, k, m, NATIVE), step(sizes, k, m, NATIVE.emulated), strict=True):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-5)  # sums are rounded in another order
        assert not mine[other == 0].any()  # of empty groups


def test_products_are_near_those_of_float64() -> None:
    sizes = SIZES["odd"]
    a, w, _, grad = operands(sizes, 160, 288)
    a, w, grad = (x.detach().double() for x in (a, w, grad))
    a, w = a[: sum(sizes)].requires_grad_(), w.requires_grad_()
    exact = torch.cat([x @ matrix.T for x, matrix in zip(a.split(sizes), w, strict=True)])
    wanted = [exact, *torch.autograd.grad(exact, (a, w), grad[: sum(sizes)])]
    for mine, other in zip(step(sizes, 160, 288, NATIVE), wanted, strict=True):
        assert sqnr(other, mine.double()) > 27


@each_size
def test_operands_pass_the_checks_of_torch(sizes: list[int]) -> None:
    """Those of the meta function; PyTorch makes the same before it calls the kernel
    (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""
    with Calls() as calls:
        results = step(sizes, 160, 288, NATIVE)
    assert len(calls.operands) == 3
    shapes = [(sum(sizes) + 2, 288), (sum(sizes) + 2, 160), tuple(results[2].shape)]
    for (a, a_scale, b, b_scale, offsets), shape in zip(calls.operands, shapes, strict=True):
        scales = (scale.view(torch.float8_e8m0fnu).to("meta") for scale in (a_scale, b_scale))
        out = torch._scaled_grouped_mm(
            *(a.to("meta"), b.to("meta").transpose(-1, -2)), *scales, offs=offsets.to("meta"), out_dtype=torch.bfloat16
        )
        assert out.shape == shape
        assert out.is_contiguous()
        for data, scale in ((a, a_scale), (b, b_scale)):
            assert data.is_contiguous()
            assert data.ndim == 3 or scale.shape[0] >= data.shape[0]
        if b.ndim == 2:
            assert not (offsets % grouped.UNIT).any()


def test_the_operator_is_known_without_data() -> None:
    with Calls() as calls:
        step(SIZES["odd"], 64, 96, NATIVE)
    for args in calls.operands:
        # (The check of the schema multiplies float8.)
        torch.library.opcheck(torch.ops.titanlite_mx.multiply_groups.default, args, test_utils="test_faketensor")


@pytest.mark.slow
def test_nothing_is_compiled_again_as_tokens_come_and_go() -> None:
    """As under expert parallelism, the number of rows changes too, and the compiler does not know it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(quantized_grouped_mm, backend="aot_eager", fullgraph=True)
    for sizes in SIZES.values():
        a, w, offsets, grad = operands(sizes, 64, 96)
        torch._dynamo.decorators.mark_unbacked(a, 0)
        out = compiled(a, w.transpose(1, 2), offsets, NATIVE)
        mine = [out[: sum(sizes)], *torch.autograd.grad(out, (a, w), grad)]
        mine[1] = mine[1][: sum(sizes)]
        for one, other in zip(mine, step(sizes, 64, 96, NATIVE), strict=True):
            torch.testing.assert_close(one, other)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# ---- what GPUs are given


def exponents_at(scales: Tensor, begin: int, rows: int, blocks: int) -> Tensor:
    """The exponents of a matrix whose tiles begin at a byte: tiles of 128 rows and 4 blocks one after the other, and in
    a tile, row r of block c at byte 16 * (r % 32) + 4 * (r // 32) + c (the layout of cuBLAS for scales of 1x32)."""
    row, block = torch.arange(rows)[:, None], torch.arange(blocks)
    tile = row // 128 * -(-blocks // 4) + block // 4
    return scales.flatten()[begin + 512 * tile + 16 * (row % 32) + 4 * (row % 128 // 32) + block % 4]


def as_units_read(
    a: Tensor,
    b: Tensor,
    a_scales: list[Tensor],
    a_recipes: list[int],
    a_orders: list[int],
    b_scales: list[Tensor],
    b_recipes: list[int],
    b_orders: list[int],
    offs: Tensor,
    bias: None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: tuple[int, ...] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """``aten::_scaled_grouped_mm_v2`` of mxfp8 operands, from the bytes alone."""
    assert a_recipes == b_recipes == [F.ScalingType.BlockWise1x32.value]
    assert a_orders == b_orders == [F.SwizzleType.SWIZZLE_32_4_4.value]
    assert (bias, out_dtype, tuple(contraction_dim), use_fast_accum) == (None, torch.bfloat16, (), False)
    ((a_scale,), (b_scale,)) = a_scales, b_scales
    meta = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b, a_scale, b_scale))
    result = torch._scaled_grouped_mm(*meta, offs=offs.to("meta"), out_dtype=out_dtype)
    out = torch.full(result.shape, torch.nan, dtype=torch.bfloat16)  # what is not written is not defined

    def values(data: Tensor, scale: Tensor, begin: int) -> Tensor:
        exponents = exponents_at(scale.view(torch.uint8), begin, data.shape[0], -(-data.shape[1] // 32))
        return data.float() * (exponents.double() - 127).exp2().float().repeat_interleave(32, 1)[:, : data.shape[1]]

    start, a_begin, b_begin = 0, 0, 0
    for group, stop in enumerate(offs.tolist()):
        size = stop - start
        if b.ndim == 3:
            right = values(b[group].t(), b_scale[group], 0)
            out[start:stop] = values(a[start:stop], a_scale, a_begin) @ right.t()
            a_begin += -(-size // 128) * 128 * (-(-a.shape[1] // 128) * 4)
        elif size:
            left, right = values(a[:, start:stop], a_scale, a_begin), values(b[start:stop].t(), b_scale, b_begin)
            out[group] = left @ right.t()
            blocks = -(-size // 128) * 4
            a_begin += -(-a.shape[0] // 128) * 128 * blocks
            b_begin += -(-b.shape[1] // 128) * 128 * blocks
        start = stop
    return out


@pytest.fixture
def units() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_grouped_mm_v2", as_units_read, "CPU")
        yield


@each_size
def test_units_are_given_what_the_operator_computes_from(sizes: list[int], units: None) -> None:
    """The kernel of the operator for GPUs, with PyTorch's function in it, and the one for the CPU."""
    with Calls() as calls:
        step(sizes, 160, 288, NATIVE)
    assert len(calls.operands) == 3
    for args in calls.operands:
        mine, other = grouped.multiply_by_units(*args), grouped.multiply(*args)
        if mine.shape[0] == sum(sizes) + 2:
            mine, other = mine[:-2], other[:-2]
        assert not mine.isnan().any()
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-5)  # sums are rounded in another order


# ---- which devices have it


def test_it_needs_sm_100_and_a_build_with_mslk(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    devices._lacks_units.cache_clear()
    built = torch.__config__.show()
    with monkeypatch.context() as patch:
        assert grouped.has_grouped_matmuls("sm_100")  # an estimate, for a PyTorch that has it
        patch.setattr(torch.version, "cuda", "12.9")
        patch.setattr(torch.__config__, "show", lambda: built.replace("USE_MSLK", ""))
        assert not grouped.has_grouped_matmuls("sm_100")
        patch.setattr(torch.__config__, "show", lambda: f"{built} -DUSE_MSLK")
        assert [name for name in ("sm_90", "sm_100", "sm_103", "sm_120") if grouped.has_grouped_matmuls(name)] == [
            "sm_100"
        ]
    cpu = torch.device("cpu")
    assert dataclasses.replace(NATIVE, target="sm_103").for_groups(cpu, torch.bfloat16).emulate
    assert NATIVE.for_groups(cpu, torch.float32).emulate
    assert caplog.messages == [
        "a grouped matmul in mxfp8 is emulated on sm_103: the same quantized values, multiplied in float32 (units need "
        "sm_100, and a PyTorch that was built with MSLK)",
        "a grouped matmul in mxfp8 is emulated on sm_100 where its result is in torch.float32: the units write "
        "torch.bfloat16 only",
    ]


def test_casts_are_those_of_the_emulated_format() -> None:
    x = torch.randn(7, 64)
    for mine, other in zip(NATIVE.cast_rows(x, Use("input", 1)), NATIVE.emulated.cast_rows(x, Use("input", 1))):
        assert mine is not None
        assert torch.equal(mine.view(torch.uint8), other.view(torch.uint8))
