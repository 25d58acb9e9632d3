"""Quantization in one or two passes over memory, as PyTorch operators that compile.

``titanlite_float8::amaxes``, ``::cast`` and ``::rescale`` are Triton kernels on GPUs and plain operations on the CPU,
with the same numbers to the bit.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
from torch import Tensor

from titanlite.float8.kernels import reference
from titanlite.float8.kernels.outputs import output_of_amaxes, output_of_rescale, outputs_of_cast

Layout = Literal["none", "tensor", "vector"]
"""One layout of a cast: left out, or with one scale for the tensor, or with one for each of its rows or columns."""

AVAILABLE = importlib.util.find_spec("triton") is not None
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
"""What can be cast."""

_library = torch.library.Library("titanlite_float8", "DEF")
_library.define("amaxes(Tensor x, str by_rows, str by_columns) -> Tensor")
_library.define(
    "cast(Tensor x, Tensor amaxes, ScalarType dtype, str by_rows, str by_columns, bool power_of_2) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
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


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``product`` (rows, columns), divided by its operands' scales, each () or (rows, 1) or (1, columns), in ``dtype``;
    in one pass."""
    return torch.ops.titanlite_float8.rescale(product, row_scale, column_scale, dtype)  # type: ignore[no-any-return]


_library.impl("amaxes", reference.amaxes, "CPU")
_library.impl("cast", reference.cast_with, "CPU")
_library.impl("rescale", reference.rescale, "CPU")
AMAXES = torch.ops.titanlite_float8.amaxes.default
torch.library.register_fake("titanlite_float8::amaxes", output_of_amaxes)
torch.library.register_fake("titanlite_float8::cast", outputs_of_cast)
torch.library.register_fake("titanlite_float8::rescale", output_of_rescale)


@torch.library.impl(_library, "amaxes", "CUDA")
def _amaxes(*args: Any) -> Tensor:
    from titanlite.float8.kernels import launch  # here, since triton is not everywhere

    return launch.amaxes(*args)


@torch.library.impl(_library, "cast", "CUDA")
def _cast(*args: Any) -> tuple[Tensor, ...]:
    from titanlite.float8.kernels import launch

    return launch.cast_with(*args)


@torch.library.impl(_library, "rescale", "CUDA")
def _rescale(*args: Any) -> Tensor:
    from titanlite.float8.kernels import launch

    return launch.rescale(*args)
