"""The matmul of emulated formats."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor


def multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in float32, under autocast too."""
    # (There is no autocast on the meta device.)
    with nullcontext() if a.is_meta else torch.autocast(a.device.type, enabled=False):
        return a.float() @ b.float()
