"""Quantization in one or two passes over memory, as PyTorch operators that compile.

``titanlite_float8::amaxes``, ``::cast``, ``::swiglu_backward`` and ``::rescale`` are Triton kernels on GPUs and plain
operations on the CPU, with the same numbers: to the bit, but for exponential functions and divisions in SwiGLU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from titanlite.quant.float8.kernels import reference
from titanlite.quant.float8.kernels.outputs import (
    output_of_amaxes,
    output_of_rescale,
    outputs_of_cast,
    outputs_of_swiglu_backward,
)

Layout = Literal["none", "tensor", "vector"]
"""One layout of a cast: left out, or with one scale for the tensor, or with one for each of its rows or columns."""

AVAILABLE = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be cast."""

_library = torch.library.Library("titanlite_float8", "DEF")
_library.define("amaxes(Tensor x, str by_rows, str by_columns, Tensor? gate=None) -> Tensor")
_library.define(
    "cast(Tensor x, Tensor amaxes, ScalarType dtype, str by_rows, str by_columns, bool power_of_2, Tensor? gate=None) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "swiglu_backward(Tensor(a!) grad, Tensor gate, Tensor up, Tensor amaxes, ScalarType dtype, str by_columns, "
    "bool power_of_2) -> (Tensor, Tensor, Tensor)"
)
_library.define("rescale(Tensor product, Tensor row_scale, Tensor column_scale, ScalarType dtype) -> Tensor")


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: Layout, by_columns: Layout, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` in float8 with dynamic scales, in up to two layouts. Reads it twice; for the row-major copy alone, with one
    scale per row, once.

    Args:
        x: (rows, columns), of one of :data:`DTYPES`, not empty.
        by_rows: the row-major copy, with "vector" one scale per row.
        by_columns: the transposed copy, with "vector" one scale per column.

    Returns:
        (rows, columns) float8; its float32 scales, () or (rows, 1); (columns, rows) float8; its scales, () or
        (1, columns). Of what is left out, tensors without elements.
    """
    # Two operators, for activation checkpointing to keep the first's result, which is small and takes a read of x.
    amaxes = torch.ops.titanlite_float8.amaxes(x, by_rows, by_columns)
    return torch.ops.titanlite_float8.cast(x, amaxes, dtype, by_rows, by_columns, power_of_2)  # type: ignore[no-any-return]


def swiglu_cast(
    gate: Tensor, up: Tensor, dtype: torch.dtype, by_rows: Layout, by_columns: Layout, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The row-major copy of ``silu(gate) * up``, which itself is never written, and what :func:`swiglu_backward` needs
    to make the other. Reads both twice.

    Args:
        gate, up: (rows, columns), of the same one of :data:`DTYPES`, not empty.
        The others: as of :func:`cast`; ``by_rows`` is not "none".

    Returns:
        (rows, columns) float8; its float32 scales, () or (rows, 1); the largest magnitudes for ``by_columns``.
    """
    amaxes = torch.ops.titanlite_float8.amaxes
    of_columns = up.new_empty(0, dtype=torch.int32) if by_columns == "none" else amaxes(up, "none", by_columns, gate)
    of_rows = of_columns if by_rows == by_columns == "tensor" else amaxes(up, by_rows, "none", gate)
    data, scale, *_ = torch.ops.titanlite_float8.cast(up, of_rows, dtype, by_rows, "none", power_of_2, gate)
    return data, scale, of_columns


def swiglu_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    amaxes: Tensor,
    dtype: torch.dtype,
    by_columns: Layout | Literal["high_precision"],
    power_of_2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of ``silu(gate) * up`` and, made again beside them, what the gradient of a weight needs of it.
    Reads each once.

    Args:
        grad: of the product, (rows, columns). It is overwritten: at this point a block needs the most memory.
        amaxes: from :func:`swiglu_cast` with the same ``by_columns``.
        by_columns: "high_precision" for the product itself, row-major.

    Returns:
        the gradients of ``gate`` and of ``up``; (columns, rows) float8; its scales, () or (1, columns). Of what is left
        out, tensors without elements.
    """
    grad = grad.contiguous()
    grad_gate, product, scale = torch.ops.titanlite_float8.swiglu_backward(
        grad, gate, up, amaxes, dtype, by_columns, power_of_2
    )
    return grad_gate, grad, product, scale


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``product`` (rows, columns), divided by its operands' scales, each () or (rows, 1) or (1, columns), in ``dtype``;
    in one pass."""
    return torch.ops.titanlite_float8.rescale(product, row_scale, column_scale, dtype)  # type: ignore[no-any-return]


_library.impl("amaxes", reference.amaxes, "CPU")
_library.impl("cast", reference.cast_with, "CPU")
_library.impl("swiglu_backward", reference.swiglu_backward, "CPU")
_library.impl("rescale", reference.rescale, "CPU")
AMAXES = torch.ops.titanlite_float8.amaxes.default
torch.library.register_fake("titanlite_float8::amaxes", output_of_amaxes)
torch.library.register_fake("titanlite_float8::cast", outputs_of_cast)
torch.library.register_fake("titanlite_float8::swiglu_backward", outputs_of_swiglu_backward)
torch.library.register_fake("titanlite_float8::rescale", output_of_rescale)


def _launched(function: str) -> Callable[..., Any]:
    """A function of launch.py, which is imported at the first call: triton is not everywhere."""

    def launch(*args: Any) -> Any:
        module = importlib.import_module("titanlite.quant.float8.kernels.launch")
        return getattr(module, function)(*args)

    return launch


_library.impl("amaxes", _launched("amaxes"), "CUDA")
_library.impl("cast", _launched("cast_with"), "CUDA")
_library.impl("swiglu_backward", _launched("swiglu_backward"), "CUDA")
_library.impl("rescale", _launched("rescale"), "CUDA")
