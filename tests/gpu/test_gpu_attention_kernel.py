"""The attention kernel that is said to compute does compute."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.distributed.attention_kernel import (
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    AttentionInputs,
    chosen_kernel,
    preferred_kernels,
    usable_kernels,
)
from titanlite.models.layers import causal_attention
from titanlite.quant.devices import architecture

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
OPERATORS = {
    CUDNN: "_scaled_dot_product_cudnn_attention",
    FLASH: "_scaled_dot_product_flash_attention",
    EFFICIENT: "_scaled_dot_product_efficient_attention",
}


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("heads", [(8, 2), (8, 8)])
def test_the_kernel_is_the_one_of_the_header(heads: tuple[int, int], dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn(1, count, 512, 128, device=device, dtype=dtype, generator=generator, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    )
    with torch.nn.attention.sdpa_kernel(MATH):
        expected = causal_attention(q.float(), k.float(), v.float())
    with preferred_kernels(device):
        kernel = chosen_kernel(architecture(device), usable_kernels(AttentionInputs(*heads, 128, dtype), device))
        with Operators() as seen:
            out = causal_attention(q, k, v)
            out.sum().backward()
    assert OPERATORS.get(kernel, "_softmax") in seen.names
    assert (out.float() - expected).norm() < 0.01 * expected.norm()
