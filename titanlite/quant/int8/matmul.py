"""Matmuls of int8 operands: by the hardware's units with int32 sums, or emulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.format import Operand
from titanlite.quant.int8 import cpu, gpu  # noqa: F401  (gpu registers the kernel of cpu.multiply for GPUs)
from titanlite.quant.int8.numerics import LONGEST, rescale


def multiply(a: Operand, b: Operand, dtype: torch.dtype, *, emulate: bool) -> Tensor:
    """Return ``a @ b`` in ``dtype``.

    The sums of products are exact; :data:`LONGEST` of them fit into int32, longer ones are added up in float32.

    Args:
        a: (m, k), int8 with scale (m, 1), or in high precision.
        b: (k, n), int8 with scale (1, n), or in high precision.
        emulate: sum in float32, which is exact up to 2**24: 1,040 products of the largest values.
    """
    if a.scale is None or b.scale is None:
        return a.data.to(dtype) @ b.data.to(dtype)
    length = a.data.shape[1]
    if not a.data.numel() or not b.data.numel():  # oneDNN does not take empty operands
        return a.data.new_zeros(a.data.shape[0], b.data.shape[1], dtype=dtype)
    if length > LONGEST:
        starts = range(0, length, LONGEST)
        parts = ((a.data[:, i : i + LONGEST], b.data[i : i + LONGEST]) for i in starts)
        operands = ((Operand(left, a.scale), Operand(right, b.scale)) for left, right in parts)
        total = sum(multiply(*pair, torch.float32, emulate=emulate) for pair in operands)
        return total.to(dtype)  # type: ignore[union-attr]
    if emulate:
        return rescale(multiply_in_float32(a.data, b.data), a.scale, b.scale, dtype)
    return cpu.multiply(a.data, a.scale, b.data, b.scale, dtype)
