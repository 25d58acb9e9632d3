"""Casts of the columns of groups of rows, as operators: Triton kernels on GPUs, and plain operations on the CPU, which
give the same bits."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from titanlite.quant.devices import on_device_of
from titanlite.quant.float8.numerics import quantize
from titanlite.quant.kernels import AVAILABLE
from titanlite.quant.kernels.outputs import largest


@torch.library.custom_op("titanlite_quant::amaxes_of_groups", mutates_args=())
def amaxes_of_groups(x: Tensor, row_of: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Return the largest magnitude of each column in each group, float32 (groups, n). Reads ``x`` once.

    Args:
        x: (rows, n), of one of :data:`titanlite.quant.kernels.DTYPES`.
        row_of: the row of ``x`` at each place, int32 [places]; -1 for zeros.
        group_of: the group of each unit of places, int32 [units]; they do not decrease.
        groups: their number.
    """
    padded = rows_at(x, row_of).abs().float()
    index = _group_of_places(row_of, group_of)[:, None].expand_as(padded)
    return padded.new_zeros(groups, x.shape[1]).scatter_reduce(0, index, padded, "amax")


@amaxes_of_groups.register_fake
def _(x: Tensor, row_of: Tensor, group_of: Tensor, groups: int) -> Tensor:
    return x.new_empty(groups, x.shape[1], dtype=torch.float32)


@torch.library.custom_op("titanlite_quant::cast_columns_of_groups", mutates_args=())
def cast_columns_of_groups(x: Tensor, row_of: Tensor, group_of: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast ``x`` to float8 with the scales of its columns in each group, float32 (groups, n); return the transpose,
    (n, places). The other arguments are those of :func:`amaxes_of_groups`."""
    return quantize(rows_at(x, row_of), scale[_group_of_places(row_of, group_of)], dtype).t().contiguous()


@cast_columns_of_groups.register_fake
def _(x: Tensor, row_of: Tensor, group_of: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape[1], row_of.shape[0], dtype=dtype)


def rows_at(x: Tensor, row_of: Tensor) -> Tensor:
    """Return the rows of ``x`` at their places, with zeros between them."""
    if not x.shape[0]:
        return x.new_zeros(row_of.shape[0], x.shape[1])
    return torch.where((row_of < 0)[:, None], 0, x[row_of.clamp(min=0)])


def _group_of_places(row_of: Tensor, group_of: Tensor) -> Tensor:
    return group_of.long().repeat_interleave(row_of.shape[0] // group_of.shape[0])


# ---- by the kernels


def amaxes_by_kernel(x: Tensor, row_of: Tensor, group_of: Tensor, groups: int) -> Tensor:
    """Compute :func:`amaxes_of_groups` by the Triton kernel."""
    launch = importlib.import_module("titanlite.quant.kernels.launch")  # triton may not be installed
    kernels = importlib.import_module("titanlite.quant.kernels.triton_groups")
    out = torch.zeros(groups, x.shape[1], dtype=torch.int32, device=x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    m, n = row_of.shape[0], x.shape[1]
    with on_device_of(x):
        kernels.group_amax_kernel[launch.AMAX_TILE.grid_over(m, n)](
            *(x, row_of, group_of, out, m, n, x.stride(0)),
            UNIT=m // group_of.shape[0],
            **launch.AMAX_TILE.options(),
        )
    return out.view(torch.float32)


def cast_by_kernel(x: Tensor, row_of: Tensor, group_of: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute :func:`cast_columns_of_groups` by the Triton kernel."""
    launch = importlib.import_module("titanlite.quant.kernels.launch")
    kernels = importlib.import_module("titanlite.quant.kernels.triton_groups")
    m, n = row_of.shape[0], x.shape[1]
    out = x.new_empty(n, m, dtype=dtype)
    x = x if x.stride(1) == 1 else x.contiguous()
    with on_device_of(x):
        kernels.group_cast_kernel[launch.CAST_TILE.grid_over(m, n)](
            *(x, row_of, group_of, scale.contiguous(), out, m, n, x.stride(0)),
            LARGEST=largest(dtype),
            DTYPE=launch.DTYPES[dtype],
            UNIT=m // group_of.shape[0],
            **launch.CAST_TILE.options(),
        )
    return out


if AVAILABLE:
    amaxes_of_groups.register_kernel("cuda")(amaxes_by_kernel)
    cast_columns_of_groups.register_kernel("cuda")(cast_by_kernel)
