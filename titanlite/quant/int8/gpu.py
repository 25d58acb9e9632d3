"""Matmuls on GPUs: by a Triton kernel, which applies the scales before it writes, or by torch._int_mm."""

from __future__ import annotations

import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.devices import architecture, on_device_of, sm
from titanlite.quant.int8 import cpu
from titanlite.quant.int8.numerics import rescale

_UNIT = 8
"""torch._int_mm takes sizes that are multiples of this, and more than 16 rows."""
_ALIGNED = 16  # bytes: the widest access to memory


class Tile(NamedTuple):
    """The part of a product that one program computes, and how."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def programs(self, m: int, n: int) -> int:
        return -(-m // self.rows) * -(-n // self.columns)

    def options(self, length: int) -> dict[str, object]:
        """Return the arguments of the kernel for operands of this length."""
        return {
            **{"BLOCK_M": self.rows, "BLOCK_N": self.columns, "BLOCK_K": self.depth},
            **{"GROUP": 8, "WHOLE": length % self.depth == 0, "num_warps": self.warps, "num_stages": self.stages},
        }


def tiles(architecture: str) -> tuple[Tile, ...]:
    """Return the tiles for an architecture, the largest first. The stages are as many as its shared memory holds."""
    if not sm(architecture):
        return Tile(128, 128, 128, 8, 2), Tile(64, 64, 128, 4, 2)
    if sm(architecture) in (80, 90, 100, 103):
        return Tile(128, 256, 128, 8, 3), Tile(128, 128, 128, 8, 4), Tile(64, 64, 128, 4, 4)
    return Tile(128, 128, 128, 8, 3), Tile(64, 64, 128, 4, 4)


def has_kernel(architecture: str) -> bool:
    """Return whether the Triton kernel computes there: Triton compiles no int8 product for sm_75."""
    return kernels.AVAILABLE and sm(architecture) != 75


def choice(architecture: str) -> str:
    """Return what casts and multiplies on GPUs of an architecture, for the log."""
    if not kernels.AVAILABLE:
        return "plain operations cast, and torch._int_mm multiplies: triton is not installed"
    if not has_kernel(architecture):
        return f"Triton kernels cast, and torch._int_mm multiplies: Triton compiles no int8 product for {architecture}"
    return "Triton kernels cast, and multiply with the scales applied before the product is written"


@cpu.multiply.register_kernel("cuda")
def _(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    if has_kernel(architecture(a.device)):
        processors = torch.cuda.get_device_properties(a.device).multi_processor_count
        return multiply_by_kernel(a, a_scale, b, b_scale, dtype, tiles(architecture(a.device)), processors)
    return rescale(_int_mm(a, b), a_scale, b_scale, dtype)


def multiply_by_kernel(
    a: Tensor,
    a_scale: Tensor,
    b: Tensor,
    b_scale: Tensor,
    dtype: torch.dtype,
    tiles: tuple[Tile, ...],
    processors: int,
) -> Tensor:
    """Compute ``titanlite_int8::multiply`` by the Triton kernel, in the largest of ``tiles`` that occupies all
    processors."""
    kernel = importlib.import_module("titanlite.quant.int8.triton_matmul").matmul_kernel  # triton may not be installed
    a, b = _aligned(a), _aligned(b.t())
    (m, k), n = a.shape, b.shape[0]
    tile = next((tile for tile in tiles if tile.programs(m, n) >= processors), tiles[-1])
    out = a.new_empty(m, n, dtype=dtype)
    with on_device_of(a):
        kernel[(tile.programs(m, n),)](
            *(a, b, a_scale.contiguous(), b_scale.contiguous(), out, m, n, k, a.stride(0), b.stride(0)),
            **tile.options(k),
        )
    return out


def _aligned(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous rows that are multiples of 16 bytes, filled up with zeros."""
    missing = -x.shape[1] % _ALIGNED
    if missing:
        return F.pad(x, (0, missing))
    return x if x.stride(1) == 1 and x.stride(0) % _ALIGNED == 0 else x.contiguous()


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` in int32, for any size."""
    m, k = a.shape
    n = b.shape[1]
    a = F.pad(a, (0, -k % _UNIT, 0, max(0, 17 - m)))
    b = F.pad(b.t(), (0, -k % _UNIT, 0, -n % _UNIT)).t()  # padded as it lies in memory
    return torch._int_mm(a, b)[:m, :n]
