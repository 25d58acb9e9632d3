"""Which attention kernel is tried first, and what is said about a slow one. No GPU is needed to choose."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend

from titanlite.distributed.attention_kernel import (
    CUDNN,
    EFFICIENT,
    FLASH,
    MATH,
    AttentionInputs,
    chosen_kernel,
    kernel_order,
    preferred_kernels,
    slow_because,
    usable_kernels,
)

LLAMA = AttentionInputs(32, 8, 128, torch.bfloat16)
ALL = {CUDNN, FLASH, EFFICIENT, MATH}


@pytest.mark.parametrize(
    ("architecture", "usable", "kernel"),
    [
        ("sm_90", ALL, CUDNN),
        ("sm_90", ALL - {CUDNN}, FLASH),
        ("sm_90", {EFFICIENT, MATH}, EFFICIENT),
        ("sm_80", ALL, FLASH),
        ("sm_100", ALL, CUDNN),
        ("gfx942", ALL - {CUDNN}, FLASH),
        ("sm_75", {EFFICIENT, MATH}, EFFICIENT),
        ("sm_90", {MATH}, MATH),
    ],
)
def test_the_first_usable_kernel_of_the_order_computes(
    architecture: str, usable: set[SDPBackend], kernel: SDPBackend
) -> None:
    assert chosen_kernel(architecture, usable) == kernel
    assert sorted(map(int, kernel_order(architecture))) == sorted(map(int, ALL))


@pytest.mark.parametrize(
    ("architecture", "kernel", "inputs", "words"),
    [
        ("sm_90", CUDNN, LLAMA, None),
        ("sm_90", FLASH, LLAMA, None),
        ("sm_75", EFFICIENT, LLAMA, None),  # it has nothing faster
        ("sm_90", EFFICIENT, LLAMA._replace(dtype=torch.float32), "training.mixed_precision_param"),
        ("sm_80", EFFICIENT, LLAMA._replace(masked=True), "sliding window"),
        ("gfx942", MATH, LLAMA._replace(head_dim=512), "32 heads of 512"),
        ("sm_75", MATH, LLAMA, "32 heads of 128 in bfloat16"),
    ],
)
def test_a_slow_kernel_has_a_reason(
    architecture: str, kernel: SDPBackend, inputs: AttentionInputs, words: str | None
) -> None:
    reason = slow_because(architecture, kernel, inputs)
    assert reason is None if words is None else words in str(reason)


@pytest.mark.parametrize("masked", [False, True])
def test_torch_is_asked_as_it_asks_itself(masked: bool) -> None:
    """Its kernels for GPUs refuse tensors of the CPU."""
    assert usable_kernels(LLAMA._replace(masked=masked), torch.device("cpu")) == {MATH}


def test_the_cpu_has_no_choice() -> None:
    before = torch._C._get_sdp_priority_order()
    with preferred_kernels(torch.device("cpu")):
        assert torch._C._get_sdp_priority_order() == before
