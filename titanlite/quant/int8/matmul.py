"""Matmuls of int8 operands: by the hardware's units with int32 sums, or emulated in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.format import Operand
from titanlite.quant.int8.cpu import rescale_product
from titanlite.quant.int8.numerics import LONGEST, rescale

_UNIT = 8
"""On GPUs, torch._int_mm takes sizes that are multiples of this, and more than 16 rows."""


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
    rows = a.data.shape[1]
    if rows == 0 or a.data.shape[0] == 0:  # oneDNN does not take empty operands
        return a.data.new_zeros(a.data.shape[0], b.data.shape[1], dtype=dtype)
    product: Tensor | None = None
    for start in range(0, rows, LONGEST):
        left, right = a.data[:, start : start + LONGEST], b.data[start : start + LONGEST]
        part = multiply_in_float32(left, right) if emulate else _int_mm(left, right)
        product = part if product is None else product.float() + part.float()
    assert product is not None
    scaled = rescale_product if a.data.is_cpu and not emulate else rescale
    return scaled(product, a.scale, b.scale, dtype)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in int32, for any size."""
    if not a.is_cuda:
        return torch._int_mm(a, b)
    m, k = a.shape
    n = b.shape[1]
    a = F.pad(a, (0, -k % _UNIT, 0, max(0, 17 - m)))
    b = F.pad(b.t(), (0, -k % _UNIT, 0, -n % _UNIT)).t()  # padded as it lies in memory
    return torch._int_mm(a, b)[:m, :n]
