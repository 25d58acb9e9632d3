"""Int8 weights: stored as int8 with a scale per row, and multiplied with inputs in high precision."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from titanlite.quant.format import Matmul, Operand, OperandName, Use
from titanlite.quant.int8.numerics import dequantize, stochastically_rounded
from titanlite.quant.int8.rows import Int8Rows


@dataclass(frozen=True)
class Int8Weights(Int8Rows):
    """Weights in int8 with a scale for each output feature; inputs and gradients stay in high precision.

    No hardware unit is needed: the int8 values, which bfloat16 holds exactly, are converted as they are multiplied. The
    scales multiply the output, and the gradient of the output before it is multiplied.
    """

    multiple = 1
    stores_weights = True

    def on(self, device: torch.device) -> Int8Weights:
        return self

    def cast(self, x: Tensor, use: Use, scale: Tensor | None = None, amax: Tensor | None = None) -> Operand:
        if use.operand != "weight":
            return Operand(x.detach(), None)
        return self.quantize(x, self.amax(x, "weight") if amax is None else amax, "weight")

    def one_cast_serves_both(self, x: Tensor, operand: OperandName, scale: Tensor | None = None) -> bool:
        return True

    def input_key(self) -> Hashable:
        return self

    def multiply(self, a: Operand, b: Operand, matmul: Matmul, dtype: torch.dtype) -> Tensor:
        if b.scale is None:
            return a.data.to(dtype) @ b.data.to(dtype)
        if matmul == "output":
            return ((a.data.to(dtype) @ b.data.to(dtype)) * b.scale).to(dtype)
        return (a.data * b.scale.t()).to(dtype) @ b.data.to(dtype)

    # ---- communication, and storage

    def travels(self, operand: OperandName) -> bool:
        return operand == "weight"

    def recast(self, arrived: Operand, operand: OperandName) -> Operand:
        return arrived

    def dequantize(self, operand: Operand) -> Tensor:
        assert operand.scale is not None
        return dequantize(*operand)  # type: ignore[arg-type]

    def requantize(self, stored: Operand, x: Tensor, amax: Tensor, bits: Tensor) -> Operand:
        assert stored.scale is not None
        return Operand(*stochastically_rounded(x, amax, stored.scale, bits))

    def describe(self) -> dict[str, str]:
        return {"int8": "weights"}
