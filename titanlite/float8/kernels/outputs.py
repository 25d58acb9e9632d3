"""The memory for what the kernels compute; also all that fake tensors need to know of them."""

from __future__ import annotations

import torch
from torch import Tensor


def outputs_of_cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape

    def layout(how: str, shape: tuple[int, int], scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
        scale = {"none": (0,), "tensor": (), "vector": scales}[how]
        return x.new_empty((0,) if how == "none" else shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)

    return *layout(by_rows, (m, n), (m, 1)), *layout(by_columns, (n, m), (1, n))


def output_of_rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(product, dtype=dtype)
