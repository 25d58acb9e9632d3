"""Launching the Triton kernels: memory, tiles, grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanlite.float8.kernels import triton_kernels as kernels
from titanlite.float8.kernels.outputs import output_of_rescale, outputs_of_cast

HOW = {"none": kernels.NONE.value, "tensor": kernels.TENSOR.value, "vector": kernels.VECTOR.value}
DTYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.float8_e5m2fnuz: tl.float8e5b16,
}


class Tile(NamedTuple):
    """What one program computes, and with how many warps."""

    rows: int
    columns: int
    warps: int

    def grid(self, x: Tensor) -> tuple[int]:
        return (triton.cdiv(x.shape[0], self.rows) * triton.cdiv(x.shape[1], self.columns),)

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps}


AMAX_TILE = Tile(64, 256, 8)
CAST_TILE = Tile(128, 128, 8)
RESCALE_TILE = Tile(32, 256, 4)
ROW_PER_WARP = 1024  # elements, in row_cast_kernel
LONGEST_ROW = 32768  # that a program of row_cast_kernel holds


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`titanlite.float8.kernels.cast`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = x.shape
    out = outputs_of_cast(x, dtype, by_rows, by_columns, power_of_2)
    numbers = {"FP8_MAX": torch.finfo(dtype).max, "POWER_OF_2": power_of_2, "DTYPE": DTYPES[dtype]}
    if (by_rows, by_columns) == ("vector", "none") and n <= LONGEST_ROW:
        block = triton.next_power_of_2(n)
        warps = min(max(block // ROW_PER_WARP, 1), 16)
        kernels.row_cast_kernel[(m,)](x, *out[:2], n, x.stride(0), BLOCK_N=block, num_warps=warps, **numbers)
        return out
    row_amaxes, column_amaxes = out[1].numel(), out[3].numel()
    amax = torch.zeros(row_amaxes + column_amaxes, dtype=torch.int32, device=x.device)
    row_amax, column_amax = amax.split([row_amaxes, column_amaxes])
    if by_rows == by_columns == "tensor":
        column_amax = row_amax
    how = {"BY_ROWS": HOW[by_rows], "BY_COLUMNS": HOW[by_columns]}
    kernels.amax_kernel[AMAX_TILE.grid(x)](*(x, row_amax, column_amax, m, n, x.stride(0)), **how, **AMAX_TILE.options())
    kernels.cast_kernel[CAST_TILE.grid(x)](
        *(x, row_amax, column_amax, *out, m, n, x.stride(0)), **numbers, **how, **CAST_TILE.options()
    )
    return out


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`titanlite.float8.kernels.rescale`."""
    out = output_of_rescale(product, row_scale, column_scale, dtype)
    steps = {"ROW_STEP": min(row_scale.ndim, 1), "COLUMN_STEP": min(column_scale.ndim, 1)}
    kernels.rescale_kernel[RESCALE_TILE.grid(product)](
        *(product, row_scale, column_scale, out, *product.shape), **steps, **RESCALE_TILE.options()
    )
    return out
