"""The kernel that computes ``scaled_dot_product_attention`` on a GPU.

torch asks its kernels in an order of priority whether they take the inputs; the first that does computes. Its default
order depends on the versions of torch and cuDNN, and often begins with FlashAttention 2, which was written for Ampere.
On Hopper, cuDNN and FlashAttention 3 are faster (Shah et al., "FlashAttention-3", 2024, figure 5). FlashAttention 3
is a package of its own; activated, it takes the place of FlashAttention 2 in every operator of torch, so in context
parallelism too.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.backends.cuda import (
    SDPAParams,
    can_use_cudnn_attention,
    can_use_efficient_attention,
    can_use_flash_attention,
)
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)

from titanlite.quant.devices import architecture, sm

logger = logging.getLogger(__name__)

CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
EFFICIENT, MATH = SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
NAMES = {CUDNN: "cuDNN", FLASH: "FlashAttention 2", EFFICIENT: "memory-efficient attention", MATH: "math"}
FLASH3, _FLASH3_MODULE = "FA3", "flash_attn_interface"  # torch's name, and the module of the package
_POSITIONS = 128  # of the inputs that the kernels are asked about


class AttentionInputs(NamedTuple):
    """The properties of the inputs that decide which kernels take them.

    Attributes:
        masked: with a mask of pairs in place of causal attention.
        value_dim: the features of a head of values; None: ``head_dim``.
    """

    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    masked: bool = False
    value_dim: int | None = None


def kernel_order(name: str) -> list[SDPBackend]:
    """Return the order in which kernels are tried on the architecture ``name``: on Hopper and Blackwell's data center
    GPUs cuDNN first; elsewhere it is behind a kernel that takes everything."""
    return [CUDNN, FLASH, EFFICIENT, MATH] if name in ("sm_90", "sm_100") else [FLASH, EFFICIENT, MATH, CUDNN]


def chosen_kernel(name: str, usable: Collection[SDPBackend]) -> SDPBackend:
    """Return the first kernel of the order that is ``usable``."""
    return next(kernel for kernel in kernel_order(name) if kernel in usable)


def slow_because(name: str, kernel: SDPBackend, inputs: AttentionInputs) -> str | None:
    """Return why a slow ``kernel`` runs on hardware that has a fast one, and the fix; None if it is the best there."""
    has_flash = sm(name) >= 80 or name.startswith("gfx9")
    if kernel in (CUDNN, FLASH) or (kernel == EFFICIENT and not has_flash):
        return None
    if inputs.dtype == torch.float32 and has_flash:
        return 'the fast kernels take 16-bit numbers; set training.mixed_precision_param = "bfloat16"'
    if inputs.masked:
        return "the fast kernels take no mask, which a sliding window shorter than the sequence needs"
    return f"no faster one takes {inputs.heads} heads of {inputs.head_dim} in {inputs.dtype}".replace("torch.", "")


def usable_kernels(inputs: AttentionInputs, device: torch.device) -> set[SDPBackend]:
    """Ask torch which kernels take such inputs on ``device``, for training."""
    heads = inputs.heads, inputs.heads if inputs.masked else inputs.kv_heads
    shapes = [(1, count, _POSITIONS, inputs.head_dim) for count in heads]
    q, k = (torch.empty(shape, dtype=inputs.dtype, device=device, requires_grad=True) for shape in shapes)
    v = k if inputs.value_dim is None else k.new_empty(*k.shape[:3], inputs.value_dim, requires_grad=True)
    mask = torch.ones(_POSITIONS, _POSITIONS, dtype=torch.bool, device=device) if inputs.masked else None
    params = SDPAParams(q, k, v, mask, 0.0, not inputs.masked, not inputs.masked and v.shape == k.shape)
    checks = {
        CUDNN: can_use_cudnn_attention,
        FLASH: can_use_flash_attention,
        EFFICIENT: can_use_efficient_attention,
    }
    return {MATH, *(kernel for kernel, takes in checks.items() if takes(params))}


@contextmanager
def preferred_kernels(device: torch.device) -> Iterator[None]:
    """Let torch try the kernels in the order of :func:`kernel_order`, and FlashAttention 3 where it is installed,
    inside this context. The CPU has no choice."""
    if device.type != "cuda":
        yield
        return
    name = architecture(device)
    with sdpa_kernel(kernel_order(name), set_priority=True):
        activated = name == "sm_90" and importlib.util.find_spec(_FLASH3_MODULE) is not None and _activate_flash3()
        try:
            yield
        finally:
            if activated:
                restore_flash_attention_impl()


def _activate_flash3() -> bool:
    """Return whether FlashAttention 3 takes the place of FlashAttention 2 from now on."""
    try:
        activate_flash_attention_impl(FLASH3)
    except (ImportError, OSError, RuntimeError) as e:  # of another version, or built for another torch
        logger.warning("FlashAttention 3 is installed, but cannot be used: %s", e)
        return False
    return True


def describe_kernel(inputs: AttentionInputs, device: torch.device, ring: bool) -> str:
    """Return the kernel that computes, for the log; warn where a slow one runs on hardware that has a fast one.

    Args:
        ring: attention is that of :mod:`titanlite.distributed.context_parallel`, which calls FlashAttention.
    """
    name = architecture(device)
    kernel = FLASH if ring else chosen_kernel(name, usable_kernels(inputs, device))
    if (reason := slow_because(name, kernel, inputs)) is not None:
        logger.warning("attention: %s runs on %s, which has faster kernels: %s", NAMES[kernel], name, reason)
    flash3 = kernel == FLASH and current_flash_attention_impl() == FLASH3
    return "FlashAttention 3" if flash3 else NAMES[kernel]
