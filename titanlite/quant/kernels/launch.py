"""Launch of the Triton kernels: memory, tiles, grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from titanlite.quant.devices import on_device_of
from titanlite.quant.kernels import triton_kernels as kernels
from titanlite.quant.kernels.outputs import (
    computes_amaxes,
    counts,
    in_one_pass,
    largest,
    output_of_amaxes,
    output_of_rescale,
    outputs_of_cast,
    outputs_of_recast,
    outputs_of_swiglu_backward,
)

LAYOUTS = {"none": kernels.NONE.value, "tensor": kernels.TENSOR.value, "vector": kernels.VECTOR.value}
DTYPES = {
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.float8_e5m2fnuz: tl.float8e5b16,
    torch.int8: tl.int8,
}
ROUNDED = {None: None, torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Tile(NamedTuple):
    """The part of a matrix that one program computes, and its number of warps."""

    rows: int
    columns: int
    warps: int

    def grid(self, x: Tensor) -> tuple[int]:
        return self.grid_over(*x.shape)

    def grid_over(self, rows: int, columns: int) -> tuple[int]:
        return (triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns),)

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.rows, "BLOCK_N": self.columns, "num_warps": self.warps}


AMAX_TILE = Tile(64, 256, 8)
CAST_TILE = Tile(64, 128, 8)
SWIGLU_TILE = Tile(64, 64, 8)
RESCALE_TILE = Tile(32, 256, 4)
ROW_PER_WARP = 1024  # elements that one warp takes in row_cast_kernel


def amaxes(x: Tensor, by_rows: str, by_columns: str, gate: Tensor | None = None) -> Tensor:
    """Compute ``titanlite_quant::amaxes``: the bits of the float32 amaxes, those of rows first, then of columns; empty
    if the cast computes its own."""
    if in_one_pass(x.shape[1], by_rows, by_columns):
        return output_of_amaxes(x, by_rows, by_columns)
    x, gate = _same_strides(x, gate)
    out = torch.zeros(sum(counts(x, by_rows, by_columns)), dtype=torch.int32, device=x.device)
    with on_device_of(x):
        kernels.amax_kernel[AMAX_TILE.grid(x)](
            *(x, gate, *_split(out, x, by_rows, by_columns), *x.shape, x.stride(0)),
            BY_ROWS=LAYOUTS[by_rows],
            BY_COLUMNS=LAYOUTS[by_columns],
            **AMAX_TILE.options(),
        )
    return out


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
    """Compute ``titanlite_quant::cast`` from the ``amaxes`` of the same layouts."""
    out = outputs_of_cast(x, amaxes, dtype, by_rows, by_columns, power_of_2)
    x, gate = _same_strides(x, gate)
    m, n = x.shape
    numbers = {**_constants(dtype, power_of_2), "ROUNDED": ROUNDED[rounded_to]}
    with on_device_of(x):
        if computes_amaxes(amaxes):
            block = triton.next_power_of_2(n)
            warps = min(max(block // ROW_PER_WARP, 1), 16)
            kernels.row_cast_kernel[(m,)](x, gate, *out[:2], n, x.stride(0), BLOCK_N=block, num_warps=warps, **numbers)
        else:
            kernels.cast_kernel[CAST_TILE.grid(x)](
                *(x, gate, *_split(amaxes, x, by_rows, by_columns), *out, m, n, x.stride(0)),
                BY_ROWS=LAYOUTS[by_rows],
                BY_COLUMNS=LAYOUTS[by_columns],
                **numbers,
                **CAST_TILE.options(),
            )
    return out


def cast(
    x: Tensor, dtype: torch.dtype, by_rows: str, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute :func:`titanlite.quant.kernels.cast` without the dispatcher."""
    return cast_with(x, amaxes(x, by_rows, by_columns), dtype, by_rows, by_columns, power_of_2)


def recast(data: Tensor, scale: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool) -> tuple[Tensor, Tensor]:
    """Compute ``titanlite_quant::recast``, by the kernels that cast high precision."""
    out = outputs_of_recast(data, scale, dtype, by_columns, power_of_2)
    data, _ = _same_strides(data, None)
    m, n = data.shape
    scale = scale.expand(m, 1).contiguous()
    amax = torch.zeros(sum(counts(data, "none", by_columns)), dtype=torch.int32, device=data.device)
    options = {"BY_ROWS": LAYOUTS["none"], "BY_COLUMNS": LAYOUTS[by_columns], "x_scale": scale}
    with on_device_of(data):
        kernels.amax_kernel[AMAX_TILE.grid(data)](
            *(data, None, None, amax, m, n, data.stride(0)),
            POWER_OF_2=power_of_2,
            **options,
            **AMAX_TILE.options(),
        )
        kernels.cast_kernel[CAST_TILE.grid(data)](
            *(data, None, None, amax, None, None, *out, m, n, data.stride(0)),
            **options,
            **_constants(dtype, power_of_2),
            **CAST_TILE.options(),
        )
    return out


def swiglu_backward(
    grad: Tensor, gate: Tensor, up: Tensor, amaxes: Tensor, dtype: torch.dtype, by_columns: str, power_of_2: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``titanlite_quant::swiglu_backward``. ``grad`` is overwritten with the gradient of ``up``."""
    if not grad.is_contiguous():
        raise ValueError(f"swiglu_backward: grad has strides {grad.stride()}: must be contiguous; call contiguous()")
    up, aligned_gate = _same_strides(up, gate)
    grad_gate, product, scale = outputs_of_swiglu_backward(grad, gate, up, amaxes, dtype, by_columns, power_of_2)
    with on_device_of(up):
        kernels.swiglu_backward_kernel[SWIGLU_TILE.grid(up)](
            *(grad, aligned_gate, up, amaxes, grad_gate),
            *(None if by_columns == "none" else product, scale, *up.shape, up.stride(0)),
            BY_COLUMNS=LAYOUTS.get(by_columns, LAYOUTS["none"]),
            **_constants(dtype, power_of_2),
            **SWIGLU_TILE.options(),
        )
    return grad_gate, product, scale


def _constants(dtype: torch.dtype, power_of_2: bool) -> dict[str, object]:
    return {"LARGEST": largest(dtype), "POWER_OF_2": power_of_2, "DTYPE": DTYPES[dtype]}


def _same_strides(x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return both with contiguous rows and the same strides."""
    if x.stride(1) == 1 and (gate is None or gate.stride() == x.stride()):
        return x, gate
    return x.contiguous(), None if gate is None else gate.contiguous()


def _split(amaxes: Tensor, x: Tensor, by_rows: str, by_columns: str) -> tuple[Tensor, Tensor]:
    """Return the amaxes of the two layouts; the same tensor twice where both have one scale for the whole tensor."""
    row_amax, column_amax = amaxes.split(counts(x, by_rows, by_columns))
    return row_amax, row_amax if by_rows == by_columns == "tensor" else column_amax


def rescale(product: Tensor, row_scale: Tensor, column_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute ``titanlite_quant::rescale``."""
    out = output_of_rescale(product, row_scale, column_scale, dtype)
    steps = {"ROW_STEP": min(row_scale.ndim, 1), "COLUMN_STEP": min(column_scale.ndim, 1)}
    inputs = (tensor.contiguous() for tensor in (product, row_scale, column_scale))
    with on_device_of(product):
        kernels.rescale_kernel[RESCALE_TILE.grid(product)](
            *(*inputs, out, *product.shape), **steps, **RESCALE_TILE.options()
        )
    return out
