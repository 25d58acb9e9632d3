"""The grouped matmul of GPUs in mxfp8: the order in which it reads scales, and an operator that multiplies.

The units read scales in tiles of 128 rows and 4 blocks (:func:`titanlite.quant.mx.numerics.swizzled`), and each group
begins with a tile (torch.nn.functional.scaled_grouped_mm; the offsets are computed in MSLK,
include/mslk/gemm/cutlass/grouped_common.cuh). How many tiles the groups need is known to the device alone, so that the
scales have the room that they can need at most.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.groups import Groups
from titanlite.quant.mx.numerics import BLOCK, TILE_BLOCKS, TILE_ROWS, dequantize, in_rows, swizzled

UNIT = TILE_BLOCKS * BLOCK
"""The rows to which a group is filled up where a matmul sums over them: so its scales are whole tiles. The units
multiply 128 of them at a time, zeros or not."""


def has_grouped_matmuls(architecture: str) -> bool:
    """Return whether PyTorch has a grouped matmul in mxfp8 for GPUs of this architecture.

    It is compiled for sm_100 alone, and only with MSLK. A PyTorch without CUDA can only estimate, for one that has it.
    """
    return architecture == "sm_100" and (torch.version.cuda is None or "USE_MSLK" in torch.__config__.show())


def scales_of_rows(exponents: Tensor, offsets: Tensor) -> Tensor:
    """Return the scales of rows in groups as :func:`multiply` takes them.

    Args:
        exponents: uint8 [rows, blocks].
        offsets: the end of each group in the rows, int32 [groups].

    Returns:
        uint8 [padded rows, padded blocks], of which the order is another.
    """
    padded = Groups(offsets, exponents.shape[0], TILE_ROWS).padded(exponents)
    return swizzled(padded).unflatten(0, (padded.shape[0], -1))


def scales_of_columns(exponents: Tensor, groups: Groups) -> Tensor:
    """Return the scales of columns in groups, the transposed result of a cast, as :func:`multiply` takes them.

    Args:
        exponents: uint8 [n, padded rows / 32].
        groups: with units of :data:`UNIT` rows.

    Returns:
        uint8 [padded n, padded rows / 32], of which the order is another: of the first group all rows of tiles, then of
        the second.
    """
    tiles = swizzled(exponents).view(-1, exponents.shape[1] // TILE_BLOCKS, TILE_ROWS * TILE_BLOCKS)
    down, across = tiles.shape[:2]
    ends = torch.cat((groups.ends // UNIT, groups.ends.new_full((1,), across))).long()
    begins, group_of = torch.cat((ends.new_zeros(1), ends[:-1])), groups.group_of.long()
    begin, width = begins[group_of], (ends - begins)[group_of]
    row, column = (torch.arange(size, device=tiles.device) for size in (down, across))
    place = begin * down + row[:, None] * width + (column - begin)
    ordered = torch.empty_like(tiles).flatten(0, 1).index_copy(0, place.flatten(), tiles.flatten(0, 1))
    return ordered.view(down * TILE_ROWS, exponents.shape[1])


@torch.library.custom_op("titanlite_mx::multiply_groups", mutates_args=())
def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    """Return one product for each group, in bfloat16, accumulated in float32: the units write no other dtype.

    On the CPU it is computed from the operands as the units read them, group by group.

    Args:
        a: e4m3 [rows, k], rows in groups; or [m, rows], columns in groups.
        b: e4m3 [groups, n, k], or [n, rows].
        a_scale, b_scale: uint8, from :func:`scales_of_rows`, and :func:`swizzled` [groups, bytes]; or both from
            :func:`scales_of_columns`.
        offsets: the end of each group, int32 [groups]; of columns, multiples of :data:`UNIT`.

    Returns:
        [rows, n]; rows after the last group are not defined. Or [groups, m, n]; that of an empty group is not defined.
    """
    out = _product(a, a_scale, b, b_scale, offsets).zero_()
    left_bytes, right_bytes = a_scale.flatten(), b_scale.flatten()
    start = begin = 0
    for group, stop in enumerate(offsets.tolist()):
        if b.ndim == 3:
            rows, blocks = stop - start, b.shape[2] // BLOCK
            size = -(-rows // TILE_ROWS) * TILE_ROWS * a_scale.shape[1]
            left = dequantize(a[start:stop], in_rows(left_bytes[begin:][:size], rows, blocks))
            right = dequantize(b[group], in_rows(b_scale[group], b.shape[1], blocks))
            out[start:stop] = multiply_in_float32(left, right.t())
            begin += size
        else:
            blocks = (stop - start) // BLOCK
            parts = ((a, left_bytes, a_scale), (b, right_bytes, b_scale))
            left, right = (
                dequantize(x[:, start:stop], in_rows(x_bytes[begin * len(s) :][: blocks * len(s)], len(x), blocks))
                for x, x_bytes, s in parts
            )
            out[group] = multiply_in_float32(left, right.t())
            begin += blocks
        start = stop
    return out


@multiply.register_fake
def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    shape = (a.shape[0], b.shape[1]) if b.ndim == 3 else (offsets.shape[0], a.shape[0], b.shape[0])
    return a.new_empty(shape, dtype=torch.bfloat16)


@multiply.register_kernel("cuda")
def multiply_by_units(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, offsets: Tensor) -> Tensor:
    """Compute ``titanlite_mx::multiply_groups`` by the units of GPUs."""
    blocks, order = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
    scales = (scale.view(torch.float8_e8m0fnu) for scale in (a_scale, b_scale))
    return F.scaled_grouped_mm(  # type: ignore[attr-defined,no-any-return]
        *(a.contiguous(), b.contiguous().transpose(-1, -2)),
        *(x for scale in scales for x in (scale, blocks)),
        *(order, order),
        offs=offsets,
        output_dtype=torch.bfloat16,
    )
