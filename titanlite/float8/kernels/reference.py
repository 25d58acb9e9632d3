"""What the kernels compute, in plain operations: what they are tested against, and what runs on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.float8.kernels.outputs import outputs_of_cast
from titanlite.float8.numerics import amax_of, amax_to_scale, quantize


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    data, scale, transposed, its_scale = outputs_of_cast(x, dtype, by_rows, by_columns, power_of_2)
    if by_rows != "none":
        scale = amax_to_scale(amax_of(x, 1 if by_rows == "vector" else None), dtype, power_of_2)
        data = quantize(x, scale, dtype).contiguous()
    if by_columns != "none":
        its_scale = amax_to_scale(amax_of(x, 0 if by_columns == "vector" else None), dtype, power_of_2)
        transposed = quantize(x, its_scale, dtype).t().contiguous()
    return data, scale, transposed, its_scale


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (product.float() * row_scale.reciprocal() * column_scale.reciprocal()).to(dtype)
