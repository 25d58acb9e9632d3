"""Mxfp8 as a number format: operands in blocks of 32 along the dimension that a matmul sums over."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titanlite.quant.devices import lacks_units, sm
from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.format import Amaxes, Matmul, Operand, OperandName, Use
from titanlite.quant.groups import GroupedFormat, Groups
from titanlite.quant.kernels import AVAILABLE, DTYPES
from titanlite.quant.mx import grouped, kernels
from titanlite.quant.mx.numerics import (
    BLOCK,
    ScaleMode,
    amax_of_blocks,
    dequantize,
    quantize,
    quantize_blocks,
    swizzled,
)


@dataclass(frozen=True)
class MXFormat(GroupedFormat):
    """Mxfp8 with dynamic scales.

    Args:
        scale_mode: see :func:`titanlite.quant.mx.numerics.quantize`.
        grad_weight: compute the gradient of the weight in mxfp8 too; False: in high precision.
        emulate: multiply the quantized values in float32.
        target: the architecture to compute for, such as "sm_100", in an estimate without that device; None: the
            device's own.
        gathered: the operands that ranks gather in mxfp8, where both of their matmuls are in mxfp8.

    The scales of an operand are exponents: as ``numerics.quantize`` returns them where the format is emulated, and
    where ranks gather them; else swizzled, in one dimension.
    """

    scale_mode: ScaleMode = "rceil"
    grad_weight: bool = True
    emulate: bool = False
    target: str | None = None
    gathered: tuple[OperandName, ...] = ()

    name = "mxfp8"
    multiple = BLOCK

    def __post_init__(self) -> None:
        # Created here because the compiler traces on(), and cannot create dataclasses.
        object.__setattr__(self, "emulated", self if self.emulate else replace(self, emulate=True))

    def on(self, device: torch.device) -> MXFormat:
        emulate = self.emulate or lacks_units("mxfp8", is_native, device, self.target)
        return self.emulated if emulate else self  # type: ignore[return-value]

    def _is_cast(self, use: Use) -> bool:
        return self.grad_weight or use.operand == "weight" or use.contracted == 1

    # ---- casts

    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        if not self._is_cast(use):
            return Operand(x.detach(), None)
        if not self.emulate and x.numel():
            return self._cast_for_units(x, use.contracted == 1, use.contracted == 0)[1 - use.contracted]
        by_columns = Operand(*quantize(x if use.contracted == 1 else x.t(), self.scale_mode))
        return by_columns if use.contracted == 1 else by_columns.t()

    def cast_both(
        self, x: Tensor, operand: OperandName, scale: Tensor | None = None, amaxes: Amaxes = (None, None)
    ) -> tuple[Operand, Operand]:
        if not self.emulate and x.numel() and self._is_cast(Use(operand, 0)):
            return self._cast_for_units(x, True, True)
        return super().cast_both(x, operand, scale, amaxes)

    def _cast_for_units(self, x: Tensor, by_features: bool, by_rows: bool) -> tuple[Operand, Operand]:
        """Cast ``x`` for a matmul that sums over its features, for one that sums over its rows, or for both."""
        data, scale, transposed, its_scale = kernels.cast(x.detach(), self.scale_mode, by_features, by_rows)
        return Operand(data, scale), Operand(transposed.t(), its_scale)

    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        return False

    def input_key(self) -> Hashable:
        return self

    # ---- matmuls

    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        if a.scale is None or b.scale is None:
            return a.data.to(dtype) @ b.data.to(dtype)
        if not a.data.numel() or not b.data.numel():
            return a.data.new_zeros(a.data.shape[0], b.data.shape[1], dtype=dtype)
        if self.emulate:
            left, right = dequantize(a.data, a.scale), dequantize(b.data.t(), b.scale.t())
            return multiply_in_float32(left, right.t()).to(dtype)
        a_scale, b_scale = (scale.view(torch.float8_e8m0fnu) for scale in (a.scale, b.scale))
        return torch._scaled_mm(a.data, b.data, scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)

    # ---- groups of rows

    has_grouped_units = staticmethod(grouped.has_grouped_matmuls)
    grouped_needs = "sm_100, and a PyTorch that was built with MSLK"
    grouped_results = (torch.bfloat16,)

    def why_not_grouped(self) -> str | None:
        return None if self.grad_weight else "its grouped matmuls are all three in the format; use mxfp8"

    def groups(self, offsets: Tensor, rows: int) -> Groups:
        # The units write nothing for a group without rows.
        return super().groups(offsets, rows) if self.emulate else Groups(offsets, rows, grouped.UNIT, least=1)

    def _by_kernels(self, x: Tensor) -> bool:
        """Return whether the Triton kernels cast ``x`` for grouped matmuls, which are emulated on GPUs too. The number
        of rows must not decide: under expert parallelism the compiler does not know it."""
        return AVAILABLE and x.dtype in DTYPES and not x.is_meta and kernels.can_cast(x.device, self.target)

    def cast_rows(self, x: Tensor, use: Use) -> Operand:
        if self._by_kernels(x):
            return Operand(*kernels.cast_rows(x.detach(), self.scale_mode))
        return Operand(*quantize(x, self.scale_mode))

    def cast_columns(self, x: Tensor, groups: Groups, use: Use) -> Operand:
        if self._by_kernels(x):
            return Operand(*kernels.cast_columns_of_groups(x.detach(), groups.row_of, self.scale_mode))
        return Operand(*quantize(groups.padded(x).t(), self.scale_mode))  # groups begin at blocks

    def cast_transposed(self, w: Tensor, use: Use) -> Operand:
        if not self._by_kernels(w):
            return super().cast_transposed(w, use)
        groups = Groups.of_matrices(w, BLOCK)
        data, scale = kernels.cast_columns_of_groups(w.detach().flatten(0, 1), groups.row_of, self.scale_mode)
        count, rows, _ = w.shape
        data = data[:, : count * rows].unflatten(1, (count, rows))
        scale = scale[:, : count * rows // BLOCK].unflatten(1, (count, rows // BLOCK))
        return Operand(data.transpose(0, 1).contiguous(), scale.transpose(0, 1).contiguous())

    def values(self, operand: Operand, groups: Groups | None = None) -> Tensor:
        assert operand.scale is not None
        return dequantize(operand.data, operand.scale)

    def multiply_rows(self, x: Operand, w: Operand, offsets: Tensor, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        if self.emulate:
            return super().multiply_rows(x, w, offsets, matmul, dtype)
        assert x.scale is not None
        assert w.scale is not None
        return grouped.multiply(x.data, grouped.scales_of_rows(x.scale, offsets), w.data, swizzled(w.scale), offsets)

    def multiply_columns(self, g: Operand, x: Operand, groups: Groups, dtype: torch.dtype) -> Tensor:
        if self.emulate:
            return super().multiply_columns(g, x, groups, dtype)
        assert g.scale is not None
        assert x.scale is not None
        g_scale, x_scale = (grouped.scales_of_columns(scale, groups) for scale in (g.scale, x.scale))
        return grouped.multiply(g.data, g_scale, x.data, x_scale, groups.ends)

    # ---- communication

    def travels(self, operand: OperandName) -> bool:
        return operand in self.gathered and self._is_cast(Use(operand, 0))

    def has_scales_of_rows(self, operand: OperandName) -> bool:
        return True

    def amax(self, x: Tensor, operand: OperandName) -> Tensor:
        return amax_of_blocks(x)

    def quantize(self, x: Tensor, amax: Tensor, operand: OperandName) -> Operand:
        return Operand(*quantize_blocks(x, amax, self.scale_mode))

    def cast_to_gather(self, shard: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Operand:
        if self._by_kernels(shard) and shard.numel() and dtype in DTYPES:
            rounded_to = None if dtype is shard.dtype else dtype
            return Operand(*kernels.cast_rows(shard.detach(), self.scale_mode, rounded_to))
        shard = shard.to(dtype)
        return self.quantize(shard, self.amax(shard, "weight"), "weight")

    def arrived(self, gathered: Operand) -> Operand:
        data, exponents = gathered
        assert exponents is not None
        return gathered if self.emulate else Operand(data, swizzled(exponents))

    def recast(self, arrived: Operand, operand: OperandName) -> Operand:
        data, exponents = arrived
        assert exponents is not None
        if self.emulate or not data.numel():
            return self.cast(dequantize(data, exponents), Use(operand, 0))
        transposed, its_scale = kernels.recast(data, exponents, self.scale_mode)
        return Operand(transposed.t(), its_scale)

    def describe(self) -> dict[str, str]:
        return {"mxfp8": self.scale_mode if self.grad_weight else f"{self.scale_mode}, grad_weight in high precision"}


def is_native(architecture: str) -> bool:
    """Return whether ``torch._scaled_mm`` multiplies mxfp8 on GPUs of this architecture."""
    return 100 <= sm(architecture) < 120
