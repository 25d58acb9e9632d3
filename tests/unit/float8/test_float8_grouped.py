"""The grouped matmul of GPUs in float8, by an operator for the CPU that reads its operands as PyTorch's kernel does,
and refuses what that one refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tests.unit.float8.test_float8_oracle import sqnr
from titanlite.quant.grouped_mm import quantized_grouped_mm
from titanlite.quant.groups import GroupedFormat
from titanlite.quant.recipes import grouped_format

SIZES = {
    "odd": [3, 17, 300, 1],
    "empty": [0, 133, 0, 7],
    "all in one": [0, 0, 270, 0],
    "no tokens": [0, 0, 0, 0],
    "whole units": [16, 32, 0, 16],
}
K, M = 64, 96


def native() -> GroupedFormat:
    return dataclasses.replace(grouped_format("float8_rowwise"), target="sm_90")  # type: ignore[type-var]


def as_units_read(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    offs: Tensor,
    bias: None = None,
    scale_result: None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``aten::_scaled_grouped_mm`` of PyTorch's ScaledGroupMM.cu and GroupMMCommon.cuh. Its checks of shapes, layouts
    and dtypes are those of the meta function."""
    tensors = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in (a, b, a_scale, b_scale, offs)
    )
    result = torch._scaled_grouped_mm(*tensors, out_dtype=out_dtype, use_fast_accum=use_fast_accum)
    out = torch.full(result.shape, torch.nan, dtype=torch.bfloat16)  # what is not written is not defined
    assert a.shape[-1] % 16 == b.shape[-2] % 16 == b.shape[-1] % 16 == 0
    begin, ends = 0, offs.tolist()
    assert len(ends) < 1024
    for group, end in enumerate(ends):
        if b.ndim == 3:
            left, right = a[begin:end].float() * a_scale[begin:end, None], b[group].float() * b_scale[group]
            out[begin:end] = left @ right
        else:
            assert end > begin, "expected offsets to be greater than 0"
            assert (end - begin) % 16 == 0 or group == len(ends) - 1, "rows of other groups are not aligned"
            scales = (scale.view(len(ends), -1)[group] for scale in (a_scale, b_scale))
            left, right = a[:, begin:end].float(), b[begin:end].float()
            out[group] = (left @ right) * next(scales)[:, None] * next(scales)
        begin = end
    return out


@pytest.fixture(autouse=True)
def units() -> Iterator[None]:
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_grouped_mm", as_units_read, "CPU")
        yield
    torch._dynamo.reset()


def operands(sizes: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, the weight of each group, offsets, and the gradient of the output; and two rows after the last group."""
    torch.manual_seed(0)
    a, w, grad = torch.randn(sum(sizes) + 2, K), torch.randn(len(sizes), M, K), torch.randn(sum(sizes) + 2, M)
    a, w, grad = a.bfloat16(), w.bfloat16(), grad.bfloat16()
    return a.requires_grad_(), w.requires_grad_(), torch.tensor(sizes).cumsum(0).int(), grad


def step(sizes: list[int], format: GroupedFormat) -> list[Tensor]:
    """The output, and the gradients of rows and weights."""
    a, w, offsets, grad = operands(sizes)
    out = quantized_grouped_mm(a, w.transpose(1, 2), offsets, format)
    grad_a, grad_w = torch.autograd.grad(out, (a, w), grad)
    return [out[: sum(sizes)], grad_a[: sum(sizes)], grad_w]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_products_of_units_are_the_emulated_ones(sizes: list[int]) -> None:
    """An expert without tokens, too: its gradient is that of a few rows of zeros."""
    format = native()
    assert format.for_groups(torch.device("cpu"), torch.bfloat16) is format
    for mine, other in zip(step(sizes, format), step(sizes, format.emulated), strict=True):
        assert mine.dtype is torch.bfloat16
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=1e-5)  # sums are rounded in another order
        assert not mine[other == 0].any()  # of empty groups


@pytest.mark.slow
def test_nothing_is_compiled_again_as_tokens_come_and_go() -> None:
    """As under expert parallelism, the number of rows changes too, and the compiler does not know it."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    format = native()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def compiled(a: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
        return quantized_grouped_mm(a, w.transpose(1, 2), offsets, format)

    for sizes in SIZES.values():
        a, w, offsets, grad = operands(sizes)
        torch._dynamo.decorators.mark_unbacked(a, 0)
        out = compiled(a, w, offsets)
        grad_a, grad_w = torch.autograd.grad(out, (a, w), grad)
        for one, other in zip((out[: sum(sizes)], grad_a[: sum(sizes)], grad_w), step(sizes, format), strict=True):
            torch.testing.assert_close(one, other)
    assert counters["stats"]["unique_graphs"] == 1


def torchaos(a: Tensor, b: Tensor, offsets: Tensor, grad: Tensor) -> list[Tensor]:
    """The output, and the gradients of ``a`` and ``b`` [groups, k, m], as torchao's ``_Float8GroupedMM`` computes them,
    by its reference casts: its kernels need a GPU."""
    from torchao.float8.config import ScalingGranularity
    from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated
    from torchao.prototype.moe_training import utils

    dtype = torch.float8_e4m3fn

    def by(dim: int, x: Tensor) -> tuple[Tensor, Tensor]:
        options = {"axiswise_dim": dim, "round_scales_to_power_of_2": True}
        scale = tensor_to_scale(x, dtype, scaling_granularity=ScalingGranularity.AXISWISE, **options)
        return to_fp8_saturated(x.float() * scale, dtype), scale.squeeze(dim)

    def multiply(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        scales = left[1].reciprocal(), right[1].reciprocal()
        return torch._scaled_grouped_mm(left[0], right[0], *scales, offsets, out_dtype=torch.bfloat16)

    a, b = a.detach(), b.detach()
    transposed, scale = utils.torch_to_3d_rowwise_float8_transpose_rhs(b, dtype, True)
    g = utils.torch_to_float8_per_group_rowwise(grad.t(), offsets, dtype, True)
    x, x_scale = utils.torch_to_float8_per_group_colwise(a, offsets, dtype, True)
    grad_b = multiply((g[0].contiguous(), g[1]), (x.t().contiguous().t(), x_scale)).transpose(1, 2)
    return [multiply(by(-1, a), by(1, b)), multiply(by(-1, grad), (transposed, scale.squeeze(1))), grad_b]


def test_all_three_matmuls_are_torchaos() -> None:
    pytest.importorskip("torchao.prototype.moe_training")
    a, w, offsets, grad = operands([16, 32, 160, 48])  # theirs takes multiples of 16, and no group without rows
    a, grad = a[:-2].detach().requires_grad_(), grad[:-2]
    b = w.transpose(1, 2)
    out = quantized_grouped_mm(a, b, offsets, native())
    mine = [out, *torch.autograd.grad(out, (a, b), grad)]
    for one, other in zip(mine, torchaos(a, b, offsets, grad), strict=True):
        assert sqnr(other.float(), one.float()) >= 40
