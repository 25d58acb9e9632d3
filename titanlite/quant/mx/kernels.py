"""The cast to mxfp8 for the units of GPUs: an operator, which is a Triton kernel there and plain operations elsewhere.
Both give the same bits."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.devices import architecture, on_device_of, sm
from titanlite.quant.kernels.groups import rows_at
from titanlite.quant.mx.numerics import BLOCK, dequantize, quantize, swizzled

TILE = 128
"""Rows and columns of one program, which are those of one tile of exponents."""
WARPS = 16


@torch.library.custom_op("titanlite_mx::cast", mutates_args=())
def cast(x: Tensor, mode: str, by_rows: bool, by_columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cast ``x`` to mxfp8 in blocks along its rows, along its columns, or both. Reads it once.

    Args:
        x: (rows, columns), not empty.
        mode: of the scales.

    Returns:
        (rows, columns) e4m3 and its exponents, uint8; (columns, rows) e4m3 and its exponents. Columns, and rows in the
        second, are padded with zeros to whole blocks. The exponents are swizzled. What is not wanted is empty.
    """
    outputs: list[Tensor] = []
    for wanted, view in ((by_rows, x), (by_columns, x.t())):
        if wanted:
            data, exponents = quantize(view, mode)  # type: ignore[arg-type]
            outputs += [data.contiguous(), swizzled(exponents)]
        else:
            outputs += _empty(x, wanted, 0, 0)
    return outputs[0], outputs[1], outputs[2], outputs[3]


def _empty(x: Tensor, wanted: bool, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return memory for the cast of a (rows, columns) matrix in blocks along its rows, and for its exponents."""
    if not wanted:
        return x.new_empty(0, dtype=torch.float8_e4m3fn), x.new_empty(0, dtype=torch.uint8)
    tiles = -(-rows // TILE) * -(-columns // TILE)
    data = x.new_empty(rows, -(-columns // BLOCK) * BLOCK, dtype=torch.float8_e4m3fn)
    return data, x.new_empty(tiles * TILE * (TILE // BLOCK), dtype=torch.uint8)


@cast.register_fake
def outputs_of_cast(x: Tensor, mode: str, by_rows: bool, by_columns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, n = x.shape
    return *_empty(x, by_rows, m, n), *_empty(x, by_columns, n, m)


def cast_by_kernel(
    x: Tensor, mode: str, by_rows: bool, by_columns: bool, x_exponents: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``titanlite_mx::cast`` by the Triton kernel; of the values of a cast in blocks along its rows, whose
    exponents are given."""
    kernel = importlib.import_module("titanlite.quant.mx.triton_casts").cast_kernel  # triton may not be installed
    out = outputs_of_cast(x, mode, by_rows, by_columns)
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape
    options = {"RCEIL": mode == "rceil", "BY_ROWS": by_rows, "BY_COLUMNS": by_columns, "SWIZZLED": True, "SIZE": TILE}
    with on_device_of(x):
        kernel[_grid(m, n)](x, None, *out, m, n, x.stride(0), x_exponents=x_exponents, **options, num_warps=WARPS)
    return out


@torch.library.custom_op("titanlite_mx::recast", mutates_args=())
def recast(data: Tensor, exponents: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cast a matrix that is in blocks along its rows in blocks along its columns, as if its float32 values were there.
    Reads it once.

    Args:
        data: (rows, columns) e4m3, of whole blocks, not empty.
        exponents: uint8, (rows, columns / 32).
        mode: of the scales.

    Returns:
        (columns, rows) e4m3 and its exponents, as of :func:`cast`.
    """
    _, _, *out = cast(dequantize(data, exponents), mode, False, True)
    return out[0], out[1]


@recast.register_fake
def _outputs_of_recast(data: Tensor, exponents: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return outputs_of_cast(data, mode, False, True)[2:]


def recast_by_kernel(data: Tensor, exponents: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Compute ``titanlite_mx::recast`` by the Triton kernel."""
    return cast_by_kernel(data, mode, False, True, exponents.contiguous())[2:]


def _grid(m: int, n: int) -> tuple[int]:
    return (-(-m // TILE) * -(-n // TILE),)


# ---- rows in groups


@torch.library.custom_op("titanlite_mx::cast_rows", mutates_args=())
def cast_rows(x: Tensor, mode: str, rounded_to: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Cast ``x`` (rows, columns), of whole blocks, in blocks along its rows.

    Args:
        rounded_to: cast what ``x.to(rounded_to)`` would be.

    Returns:
        (rows, columns) e4m3, and its exponents, uint8 (rows, columns / 32).
    """
    return quantize(x if rounded_to is None else x.to(rounded_to), mode)  # type: ignore[arg-type]


@cast_rows.register_fake
def _in_blocks(x: Tensor, mode: str, rounded_to: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    m, n = x.shape
    return x.new_empty(m, n, dtype=torch.float8_e4m3fn), x.new_empty(m, n // BLOCK, dtype=torch.uint8)


@torch.library.custom_op("titanlite_mx::cast_columns_of_groups", mutates_args=())
def cast_columns_of_groups(x: Tensor, row_of: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Cast ``x`` (rows, n) in blocks along its columns, transposed.

    Args:
        row_of: the row of ``x`` at each place, int32 [places], of whole blocks; -1 for zeros.

    Returns:
        (n, places) e4m3, and its exponents, uint8 (n, places / 32).
    """
    data, exponents = quantize(rows_at(x, row_of).t(), mode)  # type: ignore[arg-type]
    return data.contiguous(), exponents.contiguous()


@cast_columns_of_groups.register_fake
def _in_blocks_of_groups(x: Tensor, row_of: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    return _in_blocks(x.new_empty(x.shape[1], row_of.shape[0]), mode)


def cast_rows_by_kernel(x: Tensor, mode: str, rounded_to: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Compute ``titanlite_mx::cast_rows`` by the Triton kernel."""
    return _cast_in_order(x, None, mode, rounded_to)


def cast_columns_by_kernel(x: Tensor, row_of: Tensor, mode: str) -> tuple[Tensor, Tensor]:
    """Compute ``titanlite_mx::cast_columns_of_groups`` by the Triton kernel."""
    return _cast_in_order(x, row_of, mode)


def _cast_in_order(
    x: Tensor, row_of: Tensor | None, mode: str, rounded_to: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    kernel = importlib.import_module("titanlite.quant.mx.triton_casts").cast_kernel
    by_rows = row_of is None
    out = _in_blocks(x, mode) if row_of is None else _in_blocks_of_groups(x, row_of, mode)
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape[0] if row_of is None else row_of.shape[0], x.shape[1]
    outputs = (*out, None, None) if by_rows else (None, None, *out)
    options = {"RCEIL": mode == "rceil", "BY_ROWS": by_rows, "BY_COLUMNS": not by_rows, "SWIZZLED": False, "SIZE": TILE}
    options["ROUNDED"] = importlib.import_module("titanlite.quant.kernels.launch").ROUNDED[rounded_to]
    with on_device_of(x):
        kernel[_grid(m, n)](x, row_of, *outputs, m, n, x.stride(0), **options, num_warps=WARPS)
    return out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def can_cast(device: torch.device, target: str | None) -> bool:
    """Return whether Triton converts to e4m3 on ``device``, or on the architecture ``target``."""
    return sm(target or architecture(device)) >= 89


def choice() -> str:
    """Return what casts and multiplies on GPUs with units for mxfp8, for the log."""
    casts = "a Triton kernel casts both layouts in one pass" if kernels.AVAILABLE else "plain operations cast"
    return f"{casts}, and torch._scaled_mm multiplies"


if kernels.AVAILABLE:
    cast.register_kernel("cuda")(cast_by_kernel)
    recast.register_kernel("cuda")(recast_by_kernel)
    cast_rows.register_kernel("cuda")(cast_rows_by_kernel)
    cast_columns_of_groups.register_kernel("cuda")(cast_columns_by_kernel)
