"""Triton's interpreter, made as exact as a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

DTYPES = {
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
    tl.bfloat16: torch.bfloat16,
}


@contextmanager
def exact_conversions() -> Iterator[None]:
    """The interpreter's own conversions to narrow floats lose carries, subnormals and NaNs (triton 3.6, 3.9), and those
    from float8 and bfloat16 lose subnormals, which GPUs' instructions do not: PyTorch's instead."""
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:  # the same bits, and zeros
            return np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16
        if source in DTYPES and target == tl.float32:
            narrow = torch.from_numpy(np.ascontiguousarray(values).view(np.uint8)).view(DTYPES[source])
            return narrow.float().numpy().view(np.uint32)
        if source != tl.float32 or target not in DTYPES:
            return original(values, source, target, rounding)
        narrow = torch.from_numpy(np.ascontiguousarray(values)).to(DTYPES[target])
        return narrow.view(torch.uint8 if narrow.itemsize == 1 else torch.uint16).numpy()

    with patch.object(interpreter, "_convert_float", convert):
        yield
