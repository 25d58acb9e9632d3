"""Allocation of the kernels' outputs. Fake tensors use the same functions for shapes and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from titanlite.quant.int8 import numerics as int8

LONGEST_ROW = 32768  # elements that one program can hold


def in_one_pass(columns: int, by_rows: str, by_columns: str) -> bool:
    """Return whether the cast computes the amaxes itself, as it does for scales of rows alone: it reads x once."""
    return by_rows == "vector" and by_columns == "none" and columns <= LONGEST_ROW


def computes_amaxes(amaxes: Tensor) -> bool:
    """Return whether a cast that is given these amaxes computes its own, as :func:`in_one_pass` says."""
    return not amaxes.numel()


def largest(dtype: torch.dtype) -> float:
    """Return the largest magnitude of a cast to ``dtype``, float8 or int8."""
    return float(int8.LARGEST) if dtype is torch.int8 else torch.finfo(dtype).max


def counts(x: Tensor, by_rows: str, by_columns: str) -> tuple[int, int]:
    """Return the numbers of amaxes of the two layouts of a cast."""
    m, n = x.shape
    return {"none": 0, "tensor": 1, "vector": m}[by_rows], {"none": 0, "tensor": 1, "vector": n}[by_columns]


def output_of_amaxes(x: Tensor, by_rows: str, by_columns: str, gate: Tensor | None = None) -> Tensor:
    count = 0 if in_one_pass(x.shape[1], by_rows, by_columns) else sum(counts(x, by_rows, by_columns))
    return x.new_empty(count, dtype=torch.int32)


def outputs_of_cast(
    x: Tensor,
    amaxes: Tensor,
    dtype: torch.dtype,
    by_rows: str,
    by_columns: str,
    power_of_2: bool,
    gate: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape

    def outputs(layout: str, shape: tuple[int, int], scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
        scale = {"none": (0,), "tensor": (), "vector": scales}[layout]
        return x.new_empty((0,) if layout == "none" else shape, dtype=dtype), x.new_empty(scale, dtype=torch.float32)

    return *outputs(by_rows, (m, n), (m, 1)), *outputs(by_columns, (n, m), (1, n))


def outputs_of_recast(
    data: Tensor, scale: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor]:
    *_, transposed, column_scale = outputs_of_cast(data, data, dtype, "none", by_columns, power_of_2)
    return transposed, column_scale


def outputs_of_swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, amaxes: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    m, n = up.shape
    shape: tuple[int, ...] = {"none": (0,), "high_precision": (m, n)}.get(by_columns, (n, m))
    scale: tuple[int, ...] = {"tensor": (), "vector": (1, n)}.get(by_columns, (0,))
    product = up.new_empty(shape, dtype=dtype if by_columns in ("tensor", "vector") else up.dtype)
    grad_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
    return grad_gate, product, up.new_empty(scale, dtype=torch.float32)


def output_of_rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return product.new_empty(product.shape, dtype=dtype)
