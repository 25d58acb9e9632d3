"""What the kernels compute, in plain operations: what they are tested against, and what runs on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant.float8.kernels.outputs import (
    counts,
    in_one_pass,
    output_of_amaxes,
    outputs_of_cast,
    outputs_of_swiglu_backward,
)
from titanlite.quant.float8.numerics import amax_of, amax_to_scale, quantize


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, rounded once."""
    return (F.silu(gate.float()) * up.float()).to(up.dtype)


def amaxes(x: Tensor, by_rows: str, by_columns: str, gate: Tensor | None = None) -> Tensor:
    if in_one_pass(x.shape[1], by_rows, by_columns):
        return output_of_amaxes(x, by_rows, by_columns)
    x = x if gate is None else swiglu(gate, x)
    layouts = [(how, dim) for how, dim in ((by_rows, 1), (by_columns, 0)) if how != "none"]
    found = [amax_of(x, dim if how == "vector" else None).float().flatten() for how, dim in layouts]
    return torch.cat(found).view(torch.int32)


def cast_with(
    x: Tensor,
    amaxes: Tensor,
    dtype: torch.dtype,
    by_rows: str,
    by_columns: str,
    power_of_2: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x if gate is None else swiglu(gate, x)
    data, scale, transposed, its_scale = outputs_of_cast(x, amaxes, dtype, by_rows, by_columns, power_of_2)
    if in_one_pass(x.shape[1], by_rows, by_columns):
        amaxes = amax_of(x, 1).float().flatten().view(torch.int32)
    of_rows, of_columns = amaxes.view(torch.float32).split(counts(x, by_rows, by_columns))
    if by_rows != "none":
        scale = amax_to_scale(of_rows.reshape(scale.shape), dtype, power_of_2)
        data = quantize(x, scale, dtype).contiguous()
    if by_columns != "none":
        its_scale = amax_to_scale(of_columns.reshape(its_scale.shape), dtype, power_of_2)
        transposed = quantize(x, its_scale, dtype).t().contiguous()
    return data, scale, transposed, its_scale


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return cast_with(x, amaxes(x, by_rows, by_columns), dtype, by_rows, by_columns, power_of_2)


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
