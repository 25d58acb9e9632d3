"""Int8 operands with a scale for each row, as ranks gather them and as weights are stored."""

from __future__ import annotations

from torch import Tensor

from titanlite.quant.format import Format, Operand, OperandName
from titanlite.quant.int8.numerics import amax_of, amax_to_scale, quantize


class Int8Rows(Format):
    """The methods that int8 formats share."""

    name = "int8"

    def has_scales_of_rows(self, operand: OperandName) -> bool:
        return True

    def amax(self, x: Tensor, operand: OperandName) -> Tensor:
        return amax_of(x, -1)

    def quantize(self, x: Tensor, amax: Tensor, operand: OperandName) -> Operand:
        scale = amax_to_scale(amax)
        return Operand(quantize(x, scale), scale)
