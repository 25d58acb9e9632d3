"""The kernels' computations in plain operations. They run on the CPU, and tests compare the kernels with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant.float8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.int8 import numerics as int8
from titanlite.quant.kernels.outputs import (
    computes_amaxes,
    counts,
    in_one_pass,
    output_of_amaxes,
    outputs_of_cast,
    outputs_of_swiglu_backward,
)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``silu(gate) * up``, computed in float32 and rounded once."""
    return (F.silu(gate.float()) * up.float()).to(up.dtype)


def amaxes(x: Tensor, by_rows: str, by_columns: str, gate: Tensor | None = None) -> Tensor:
    if in_one_pass(x.shape[1], by_rows, by_columns):
        return output_of_amaxes(x, by_rows, by_columns)
    x = x if gate is None else swiglu(gate, x)
    layouts = [(layout, dim) for layout, dim in ((by_rows, 1), (by_columns, 0)) if layout != "none"]
    parts = [amax_of(x, dim if layout == "vector" else None).float().flatten() for layout, dim in layouts]
    return torch.cat(parts).view(torch.int32)


def cast_with(
    x: Tensor,
    amaxes: Tensor,
    dtype: torch.dtype,
    by_rows: str,
    by_columns: str,
    power_of_2: bool,
    gate: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if rounded_to is None else x.to(rounded_to)
    x = x if gate is None else swiglu(gate, x)
    data, scale, transposed, column_scale = outputs_of_cast(x, amaxes, dtype, by_rows, by_columns, power_of_2)
    if computes_amaxes(amaxes):
        amaxes = amax_of(x, 1).float().flatten().view(torch.int32)
    row_amax, column_amax = amaxes.view(torch.float32).split(counts(x, by_rows, by_columns))
    if by_rows != "none":
        data, scale = _quantized(x, row_amax.reshape(scale.shape), dtype, power_of_2)
        data = data.contiguous()
    if by_columns != "none":
        by_columns_data, column_scale = _quantized(x, column_amax.reshape(column_scale.shape), dtype, power_of_2)
        transposed = by_columns_data.t().contiguous()
    return data, scale, transposed, column_scale


def _quantized(x: Tensor, amax: Tensor, dtype: torch.dtype, power_of_2: bool) -> tuple[Tensor, Tensor]:
    if dtype is torch.int8:
        scale = int8.amax_to_scale(amax)
        return int8.quantize(x, scale), scale
    scale = amax_to_scale(amax, dtype, power_of_2)
    return quantize(x, scale, dtype), scale


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cast_with(x, amaxes(x, by_rows, by_columns), dtype, by_rows, by_columns, power_of_2)


def recast(data: Tensor, scale: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool) -> tuple[Tensor, Tensor]:
    values = int8.dequantize(data, scale) if data.dtype is torch.int8 else dequantize(data, scale)
    *_, transposed, column_scale = cast(values, dtype, "none", by_columns, power_of_2)
    return transposed, column_scale


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, amaxes: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    _, product, scale = outputs_of_swiglu_backward(grad, gate, up, amaxes, dtype, by_columns, power_of_2)
    g, sigmoid = gate.float(), gate.float().sigmoid()
    grad_gate = (grad.float() * up.float() * sigmoid * (1 + g * (1 - sigmoid))).to(gate.dtype)
    grad.copy_(grad.float() * F.silu(g))
    if by_columns == "high_precision":
        product = swiglu(gate, up)
    elif by_columns != "none":
        *_, product, scale = cast_with(up, amaxes, dtype, "none", by_columns, power_of_2, gate)
    return grad_gate.contiguous(), product.contiguous(), scale


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (product.float() * row_scale.reciprocal() * column_scale.reciprocal()).to(dtype)
