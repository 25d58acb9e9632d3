"""Quantization in one or two passes over memory, as PyTorch operators that work with torch.compile.

``titanlite_quant::amaxes``, ``::cast``, ``::recast``, ``::swiglu_backward`` and ``::rescale`` are Triton kernels on
GPUs and plain operations on the CPU. Both give the same bits, except for the exponential and the division in SwiGLU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from titanlite.quant.format import Operand
from titanlite.quant.kernels import reference
from titanlite.quant.kernels.outputs import (
    counts,
    output_of_amaxes,
    output_of_rescale,
    outputs_of_cast,
    outputs_of_recast,
    outputs_of_swiglu_backward,
)

Layout = Literal["none", "tensor", "vector"]
"""One layout of a cast: not wanted, with one scale for the tensor, or with one scale for each row or column."""

AVAILABLE = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""The dtypes that can be cast."""
QUANTIZED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8)
"""The dtypes that a cast gives, and that can be cast again."""

_library = torch.library.Library("titanlite_quant", "DEF")
_library.define("amaxes(Tensor x, str by_rows, str by_columns, Tensor? gate=None) -> Tensor")
_library.define(
    "cast(Tensor x, Tensor amaxes, ScalarType dtype, str by_rows, str by_columns, bool power_of_2, Tensor? gate=None, "
    "ScalarType? rounded_to=None) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "recast(Tensor data, Tensor scale, ScalarType dtype, str by_columns, bool power_of_2) -> (Tensor, Tensor)"
)
_library.define(
    "swiglu_backward(Tensor(a!) grad, Tensor gate, Tensor up, Tensor amaxes, ScalarType dtype, str by_columns, "
    "bool power_of_2) -> (Tensor, Tensor, Tensor)"
)
_library.define("rescale(Tensor product, Tensor row_scale, Tensor column_scale, ScalarType dtype) -> Tensor")


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude in ``x``, float32, (). ``x`` is as for :func:`cast`."""
    return torch.ops.titanlite_quant.amaxes(x, "tensor", "none").view(torch.float32).reshape(())  # type: ignore[no-any-return]


def cast(
    x: Tensor,
    dtype: torch.dtype,
    by_rows: Layout,
    by_columns: Layout,
    power_of_2: bool,
    amax: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast ``x`` to float8 or int8 with dynamic scales, in up to two layouts. Reads ``x`` twice, or once for scales of
    rows alone.

    Args:
        x: (rows, columns), of one of :data:`DTYPES`, not empty.
        by_rows: the row-major copy; "vector": one scale per row.
        by_columns: the transposed copy; "vector": one scale per column.
        amax: float32, in place of the amaxes of ``x``: () for tensor scales; for one layout with vector scales, one for
            each.
        rounded_to: cast what ``x.to(rounded_to)`` would be, without writing it; ``amax`` is that of ``x`` still.

    Returns:
        (rows, columns) of ``dtype``; its float32 scales, () or (rows, 1); (columns, rows) of ``dtype``; its scales, ()
        or (1, columns). A layout that is "none" gives empty tensors.
    """
    # Two operators, so that activation checkpointing can keep the amaxes, which are small but cost a read of x.
    if amax is None:
        amaxes = torch.ops.titanlite_quant.amaxes(x, by_rows, by_columns)
    else:
        amaxes = amax.flatten().view(torch.int32).expand(sum(counts(x, by_rows, by_columns))).contiguous()
    if rounded_to is None:
        return torch.ops.titanlite_quant.cast(x, amaxes, dtype, by_rows, by_columns, power_of_2)  # type: ignore[no-any-return]
    if amaxes.numel():  # rounding is monotonic: the rounded amax is the amax of what is rounded
        amaxes = amaxes.view(torch.float32).to(rounded_to).float().view(torch.int32)
    return torch.ops.titanlite_quant.cast(  # type: ignore[no-any-return]
        x, amaxes, dtype, by_rows, by_columns, power_of_2, rounded_to=rounded_to
    )


def cast_operands(
    x: Tensor,
    dtype: torch.dtype,
    by_features: Layout,
    by_rows: Layout,
    power_of_2: bool,
    amax: Tensor | None = None,
    rounded_to: torch.dtype | None = None,
) -> tuple[Operand, Operand]:
    """Cast ``x`` (rows, features) for a matmul that sums over its features, for one that sums over its rows, or for
    both, in the fewest reads and in the memory layouts that the units need. The arguments are those of :func:`cast`. An
    operand whose layout is "none" is empty."""
    data, scale, transposed, transposed_scale = cast(
        x.detach(), dtype, by_features, by_rows, power_of_2, amax, rounded_to
    )
    return Operand(data, scale), Operand(transposed.t(), transposed_scale)


def recast(arrived: Operand, dtype: torch.dtype, by_columns: Layout, power_of_2: bool) -> Operand:
    """Cast a quantized operand again, for a matmul that sums over its rows, as if its float32 values were there. Reads
    it twice, a byte per element, and writes a byte.

    Args:
        arrived: (rows, columns) of one of :data:`QUANTIZED`, not empty; its float32 scales, (rows, 1) or (): in float8
            powers of two if ``power_of_2``.
        dtype: int8 if the data is, else float8.
        by_columns: "tensor": one scale; "vector": one scale per column.

    Returns:
        (rows, columns) of ``dtype``, whose columns are contiguous; its scales, () or (1, columns).
    """
    transposed, scale = torch.ops.titanlite_quant.recast(*arrived, dtype, by_columns, power_of_2)
    return Operand(transposed.t(), scale)


def swiglu_cast(
    gate: Tensor, up: Tensor, dtype: torch.dtype, by_rows: Layout, by_columns: Layout, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cast ``silu(gate) * up`` to its row-major copy, without writing the product. Reads both tensors twice.

    Args:
        gate, up: (rows, columns), of the same one of :data:`DTYPES`, not empty.
        by_columns: the layout that :func:`swiglu_backward` will make; only its amaxes are computed here.
        The others: as in :func:`cast`; ``by_rows`` is not "none".

    Returns:
        (rows, columns) float8; its float32 scales, () or (rows, 1); the amaxes for ``by_columns``.
    """
    amaxes = torch.ops.titanlite_quant.amaxes
    column_amax = up.new_empty(0, dtype=torch.int32) if by_columns == "none" else amaxes(up, "none", by_columns, gate)
    row_amax = column_amax if by_rows == by_columns == "tensor" else amaxes(up, by_rows, "none", gate)
    data, scale, *_ = torch.ops.titanlite_quant.cast(up, row_amax, dtype, by_rows, "none", power_of_2, gate)
    return data, scale, column_amax


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    amaxes: Tensor,
    dtype: torch.dtype,
    by_columns: Layout | Literal["high_precision"],
    power_of_2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of ``silu(gate) * up``, and recompute the product for the weight's gradient. Reads each
    tensor once.

    Args:
        grad: the gradient of the product, (rows, columns). It is overwritten, since memory peaks here in a block.
        amaxes: from :func:`swiglu_cast` with the same ``by_columns``.
        by_columns: the layout of the product; "high_precision": not cast, row-major.

    Returns:
        The gradients of ``gate`` and of ``up``; the product, (columns, rows) float8; its scales, () or (1, columns).
        A layout that is "none" gives empty tensors.
    """
    grad = grad.contiguous()
    grad_gate, product, scale = torch.ops.titanlite_quant.swiglu_backward(
        grad, gate, up, amaxes, dtype, by_columns, power_of_2
    )
    return grad_gate, grad, product, scale


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Divide ``product`` (rows, columns) by its operands' scales, () or (rows, 1) and () or (1, columns), in one pass;
    the result has ``dtype``."""
    return torch.ops.titanlite_quant.rescale(product, row_scale, column_scale, dtype)  # type: ignore[no-any-return]


_library.impl("amaxes", reference.amaxes, "CPU")
_library.impl("cast", reference.cast_with, "CPU")
_library.impl("recast", reference.recast, "CPU")
_library.impl("swiglu_backward", reference.swiglu_backward, "CPU")
_library.impl("rescale", reference.rescale, "CPU")
AMAXES = torch.ops.titanlite_quant.amaxes.default
torch.library.register_fake("titanlite_quant::amaxes", output_of_amaxes)
torch.library.register_fake("titanlite_quant::cast", outputs_of_cast)
torch.library.register_fake("titanlite_quant::recast", outputs_of_recast)
torch.library.register_fake("titanlite_quant::swiglu_backward", outputs_of_swiglu_backward)
torch.library.register_fake("titanlite_quant::rescale", output_of_rescale)


def _launched(function: str) -> Callable[..., Any]:
    """Return a function of launch.py, which is imported at the first call, because triton may not be installed."""

    def launch(*args: Any) -> Any:
        module = importlib.import_module("titanlite.quant.kernels.launch")
        return getattr(module, function)(*args)

    return launch


_library.impl("amaxes", _launched("amaxes"), "CUDA")
_library.impl("cast", _launched("cast_with"), "CUDA")
_library.impl("recast", _launched("recast"), "CUDA")
_library.impl("swiglu_backward", _launched("swiglu_backward"), "CUDA")
_library.impl("rescale", _launched("rescale"), "CUDA")
