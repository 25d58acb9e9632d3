"""Int8 as a number format: an operand has one scale for each row, or column, that a matmul sums over."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titanlite.quant import kernels
from titanlite.quant.devices import lacks_units, sm
from titanlite.quant.format import Amaxes, Matmul, Operand, OperandName, Use
from titanlite.quant.groups import GroupedFormat, Groups
from titanlite.quant.int8 import cpu
from titanlite.quant.int8.matmul import multiply
from titanlite.quant.int8.numerics import amax_of, amax_to_scale, dequantize, quantize
from titanlite.quant.int8.rows import Int8Rows
from titanlite.quant.kernels import Layout

_USES: dict[Matmul, tuple[Use, Use]] = {
    "output": (Use("input", 1), Use("weight", 1)),
    "grad_input": (Use("grad_output", 1), Use("weight", 0)),
    "grad_weight": (Use("grad_output", 0), Use("input", 0)),
}
_AMD = ("gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")


@dataclass(frozen=True)
class Int8Format(Int8Rows, GroupedFormat):
    """Int8 with dynamic scales.

    Args:
        matmuls: those that are computed in int8; the others, and what is saved for them, are in high precision.
        emulate: multiply the quantized values in float32.
        target: the architecture to compute for, such as "sm_90", in an estimate without that device; None: the
            device's own.
        gathered: the operands that ranks gather in int8, where both of their matmuls are in int8.
    """

    matmuls: tuple[Matmul, ...] = ("output", "grad_input", "grad_weight")
    emulate: bool = False
    target: str | None = None
    gathered: tuple[OperandName, ...] = ()

    multiple = 8

    def __post_init__(self) -> None:
        # Created here because the compiler traces on(), and cannot create dataclasses.
        object.__setattr__(self, "emulated", self if self.emulate else replace(self, emulate=True))
        object.__setattr__(self, "uses", {use for matmul in self.matmuls for use in _USES[matmul]})

    def on(self, device: torch.device) -> Int8Format:
        emulate = self.emulate or lacks_units("int8", is_native, device, self.target)
        return self.emulated if emulate else self  # type: ignore[return-value]

    def _is_cast(self, use: Use) -> bool:
        return use in self.uses  # type: ignore[attr-defined]

    # ---- casts

    def _by_kernels(self, x: Tensor, dtypes: tuple[torch.dtype, ...] = kernels.DTYPES) -> bool:
        """Return whether the Triton kernels cast ``x``."""
        on_gpu = x.is_cuda if self.target is None else self.target != "cpu"
        return on_gpu and not self.emulate and kernels.AVAILABLE and x.dtype in dtypes and x.numel() > 0

    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        if not self._is_cast(use):
            return Operand(x.detach(), None)
        if self._by_kernels(x):
            layouts: tuple[Layout, Layout] = ("vector", "none") if use.contracted == 1 else ("none", "vector")
            return kernels.cast_operands(x, torch.int8, *layouts, False, amax)[1 - use.contracted]
        # GPUs want the summed dimension contiguous; oneDNN only that of the left operand, which is a transpose.
        transpose = use.contracted == 0 and (not x.is_cpu or use.operand == "grad_output")
        if amax is None and x.is_cpu and x.numel() and not self.emulate:
            return Operand(*cpu.cast(x.detach(), use.contracted, transpose))
        scale = amax_to_scale(amax_of(x, use.contracted) if amax is None else amax)
        data = quantize(x, scale)
        return Operand(data.t().contiguous().t() if transpose and not self.emulate else data, scale)

    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        return not any(self._is_cast(Use(operand, contracted)) for contracted in (0, 1))

    def cast_both(
        self, x: Tensor, operand: OperandName, scale: Tensor | None = None, amaxes: Amaxes = (None, None)
    ) -> tuple[Operand, Operand]:
        both = all(self._is_cast(Use(operand, contracted)) for contracted in (0, 1))
        if both and amaxes == (None, None) and self._by_kernels(x):
            return kernels.cast_operands(x, torch.int8, "vector", "vector", False)
        return super().cast_both(x, operand, scale, amaxes)

    def input_key(self) -> Hashable:
        return self

    # ---- matmuls

    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        return multiply(a, b, dtype, emulate=self.emulate)

    # ---- groups of rows

    def why_not_grouped(self) -> str | None:
        return None if len(self.matmuls) == 3 else "its grouped matmuls are all three in the format; use rowwise"

    def cast_rows(self, x: Tensor, use: Use) -> Operand:
        scale = amax_to_scale(x.abs().amax(1, keepdim=True).float())
        return Operand(quantize(x, scale).contiguous(), scale)

    def cast_columns(self, x: Tensor, groups: Groups, use: Use) -> Operand:
        padded = groups.padded(x)
        scale = amax_to_scale(groups.amax(padded))
        return Operand(quantize(padded, scale[groups.number]).t().contiguous(), scale)

    def values(self, operand: Operand, groups: Groups | None = None) -> Tensor:
        data, scale = operand
        assert scale is not None
        return dequantize(data, scale if groups is None else scale[groups.number].t())

    # ---- communication

    def travels(self, operand: OperandName) -> bool:
        return operand in self.gathered and all(self._is_cast(Use(operand, contracted)) for contracted in (0, 1))

    def cast_to_gather(self, shard: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Operand:
        if not self._by_kernels(shard) or dtype not in kernels.DTYPES:
            return super().cast_to_gather(shard, dtype, amax)
        rounded_to = None if dtype is shard.dtype else dtype
        return kernels.cast_operands(shard, torch.int8, "vector", "none", False, amax, rounded_to)[0]

    def recast(self, arrived: Operand, operand: OperandName) -> Operand:
        if self._by_kernels(arrived.data, kernels.QUANTIZED):
            return kernels.recast(arrived, torch.int8, "vector", False)
        return self.cast(dequantize(*arrived), Use(operand, 0))  # type: ignore[arg-type]

    def agrees(self, use: Use, sharded: int) -> bool:
        return self._is_cast(use) and use.contracted == sharded

    def amaxes(self, x: Tensor, uses: Iterable[Use]) -> dict[Use, Tensor]:
        return {use: amax_of(x, use.contracted) for use in uses}

    def describe(self) -> dict[str, str]:
        return {"int8": ",".join(self.matmuls)}


def is_native(architecture: str) -> bool:
    """Return whether ``torch._int_mm`` has int8 units on this architecture; on "cpu", whether this machine's has."""
    if architecture == "cpu":
        return bool(torch.cpu._is_vnni_supported())
    return sm(architecture) >= 75 or architecture in _AMD
