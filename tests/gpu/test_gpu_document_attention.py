"""Attention within documents by FlexAttention: its results and gradients are those of the mask of all pairs."""

from __future__ import annotations

import pytest
import torch

from tests.unit.models.test_documents import starts_of
from titanlite.distributed.document_attention import attend_in_blocks, block_mask
from titanlite.models.layers import causal_attention, document_mask

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize(
    "rows", [[[512, 512], [1000, 24]], [[3] * 341 + [1], [128] * 8], [[700], [5, 695]]], ids=["long", "short", "odd"]
)
def test_results_and_gradients_are_those_of_a_mask(rows: list[list[int]], window: int | None) -> None:
    starts = starts_of(rows).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(2, heads, starts.shape[1], 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", generator=generator, requires_grad=True) for shape in shapes]
    grad = torch.randn(shapes[0], device="cuda", generator=generator)
    expected = causal_attention(*inputs, window, document_mask(starts, window))
    gradients = torch.autograd.grad(expected, inputs, grad)
    halves = [x.detach().bfloat16().requires_grad_() for x in inputs]
    out = attend_in_blocks(*halves, window, block_mask(starts, window))
    for ours, truth in zip(
        (out, *torch.autograd.grad(out, halves, grad.bfloat16())), (expected, *gradients), strict=True
    ):
        assert (ours.float() - truth).norm() < 0.01 * truth.norm()
