"""The operands of one layer: each is cast once for all matmuls, microbatches and layers that can share the cast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlite.quant.format import WEIGHT, WEIGHT_FOR_GRAD_INPUT, Format, Operand, OperandName, Use
from titanlite.quant.reuse import WeightCopies, remember, remembered
from titanlite.quant.tensor import QuantTensor


class Operands:
    """The casts of the operands of one layer.

    Args:
        layer: the layer; it has the weight, the buffers of the format, and the training mode.
        keep_weight: keep the casts of the weight for later microbatches, and between forward and backward.
    """

    def __init__(self, layer: nn.Linear, keep_weight: bool) -> None:
        self.layer = layer
        self.keep_weight = keep_weight
        self.copies = WeightCopies()

    def input(self, x: Tensor, format: Format, for_weight: bool) -> tuple[Operand, Operand]:
        """Cast the input for the output and, if ``for_weight``, for grad_weight. The two are the same object where one
        cast serves both. Layers that share an input share its casts.

        Args:
            x: [..., in_features].
        """
        key = (format.input_key(), for_weight)
        shared = key[0] is not None
        if shared:
            casts: tuple[Operand, Operand] | None = remembered(x, key)
            if casts is not None:
                return casts
        casts = self._activation(x.operand() if isinstance(x, QuantTensor) else x, "input", format, for_weight)
        if shared:
            remember(x, key, casts)
        return casts

    def grad_output(self, grad: Tensor | Operand, format: Format, for_weight: bool) -> tuple[Operand, Operand]:
        """Cast the gradient of the output, [..., out_features], for grad_input and, if ``for_weight``, grad_weight."""
        return self._activation(grad, "grad_output", format, for_weight)

    def _activation(
        self, x: Tensor | Operand, operand: OperandName, format: Format, for_weight: bool
    ) -> tuple[Operand, Operand]:
        if isinstance(x, Operand):  # it was gathered in the format
            return x, format.recast(x, operand) if for_weight else x
        x = x.detach().reshape(-1, x.shape[-1])
        scale = format.scale_from_state(self.layer, x, operand)
        if for_weight:
            return format.cast_both(x, operand, scale)
        by_features = format.cast(x, Use(operand, 1), scale)
        return by_features, by_features

    def weight_for_output(self, weight: Tensor, format: Format) -> Operand:
        """Cast the local weight for the output."""
        if isinstance(weight, QuantTensor):
            return weight.operand()
        return self._weight(weight, self.layer.weight, format, for_output=True)

    def weight_for_grad_input(self, weight: Tensor, source: Tensor | None, format: Format) -> Operand:
        """Cast the local weight for grad_input.

        Args:
            source: the parameter that forward used, whose local part is ``weight``; None: keep no copy.
        """
        if isinstance(weight, QuantTensor):
            return format.recast(weight.operand(), "weight")
        return self._weight(weight, source, format, for_output=False)

    def _weight(self, weight: Tensor, source: Tensor | None, format: Format, *, for_output: bool) -> Operand:
        use = WEIGHT if for_output else WEIGHT_FOR_GRAD_INPUT

        def make() -> Operand:
            return format.cast(weight, use, format.scale_from_state(self.layer, weight, "weight"))

        keep = self.keep_weight and self.layer.training
        if not keep or source is None or torch.compiler.is_compiling() or source.is_inference():
            return make()
        key = WEIGHT if format.one_cast_serves_both(weight, "weight") else use
        copy: Operand = self.copies.get(source, key, make, in_forward=for_output)
        return copy
