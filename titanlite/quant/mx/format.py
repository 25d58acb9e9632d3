"""Mxfp8 as a number format: operands in blocks of 32 along the dimension that a matmul sums over."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from titanlite.quant.devices import lacks_units, sm
from titanlite.quant.emulation import multiply_in_float32
from titanlite.quant.format import Format, Matmul, Operand, OperandName, Use
from titanlite.quant.mx.numerics import BLOCK, ScaleMode, dequantize, quantize, swizzled


@dataclass(frozen=True)
class MXFormat(Format):
    """Mxfp8 with dynamic scales.

    Args:
        scale_mode: see :func:`titanlite.quant.mx.numerics.quantize`.
        grad_weight: compute the gradient of the weight in mxfp8 too; False: in high precision.
        emulate: multiply the quantized values in float32.
    """

    scale_mode: ScaleMode = "rceil"
    grad_weight: bool = True
    emulate: bool = False

    name = "mxfp8"
    multiple = BLOCK

    def __post_init__(self) -> None:
        # Created here because the compiler traces on(), and cannot create dataclasses.
        object.__setattr__(self, "emulated", self if self.emulate else replace(self, emulate=True))

    def on(self, device: torch.device) -> MXFormat:
        return self.emulated if self.emulate or lacks_units("mxfp8", is_native, device) else self  # type: ignore[attr-defined, no-any-return]

    def _is_cast(self, use: Use) -> bool:
        return self.grad_weight or use.operand == "weight" or use.contracted == 1

    # ---- casts

    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        if not self._is_cast(use):
            return Operand(x.detach(), None)
        by_columns = Operand(*quantize(x if use.contracted == 1 else x.t(), self.scale_mode))
        return by_columns if use.contracted == 1 else by_columns.t()

    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        return False

    def input_key(self) -> Hashable:
        return self

    # ---- matmuls

    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        if a.scale is None or b.scale is None:
            return a.data.to(dtype) @ b.data.to(dtype)
        b = b.t()  # (n, k), whose blocks lie along the columns
        assert b.scale is not None
        if self.emulate or not a.data.numel():
            return multiply_in_float32(dequantize(*a), dequantize(*b).t()).to(dtype)  # type: ignore[arg-type]
        a_scale, b_scale = (swizzled(scale).view(torch.float8_e8m0fnu) for scale in (a.scale, b.scale))
        return torch._scaled_mm(a.data, b.data.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=dtype)

    def describe(self) -> dict[str, str]:
        return {"mxfp8": self.scale_mode if self.grad_weight else f"{self.scale_mode}, grad_weight in high precision"}


def is_native(architecture: str) -> bool:
    """Return whether ``torch._scaled_mm`` multiplies mxfp8 on GPUs of this architecture."""
    return 100 <= sm(architecture) < 120
