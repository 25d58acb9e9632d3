"""The operands of one layer: each is cast once for all matmuls, microbatches and layers that can share the cast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlite.quant.format import WEIGHT, WEIGHT_FOR_GRAD_INPUT, Format, Operand, OperandName, Use
from titanlite.quant.reuse import WeightCopies, remember, remembered
from titanlite.quant.tensor import QuantTensor


class CastsOperands(nn.Linear):
    """A layer whose operands are cast: it has the weight, the buffers of the format, and the training mode.

    Attributes:
        copies: the casts of the weight that are kept.
        keep_weight: keep them for later microbatches, and between forward and backward.
    """

    copies: WeightCopies
    keep_weight: bool


def cast_input(layer: CastsOperands, x: Tensor, format: Format, for_weight: bool) -> tuple[Operand, Operand]:
    """Cast the input for the output and, if ``for_weight``, for grad_weight. The two are the same object where one cast
    serves both. Layers that share an input share its casts.

    Args:
        x: [..., in_features].
    """
    options = format.input_key()
    key = (type(format), options, for_weight)
    if options is not None:
        casts: tuple[Operand, Operand] | None = remembered(x, key)
        if casts is not None:
            return casts
    casts = _cast_activation(layer, x.operand() if isinstance(x, QuantTensor) else x, "input", format, for_weight)
    if options is not None:
        remember(x, key, casts)
    return casts


def cast_grad_output(
    layer: CastsOperands, grad: Tensor | Operand, format: Format, for_weight: bool
) -> tuple[Operand, Operand]:
    """Cast the gradient of the output, [..., out_features], for grad_input and, if ``for_weight``, grad_weight."""
    return _cast_activation(layer, grad, "grad_output", format, for_weight)


def _cast_activation(
    layer: CastsOperands, x: Tensor | Operand, operand: OperandName, format: Format, for_weight: bool
) -> tuple[Operand, Operand]:
    if isinstance(x, Operand):  # it was gathered in the format
        return x, format.recast(x, operand) if for_weight else x
    x = x.detach().reshape(-1, x.shape[-1])
    scale = format.scale_from_state(layer, x, operand)
    if for_weight:
        return format.cast_both(x, operand, scale)
    by_features = format.cast(x, Use(operand, 1), scale)
    return by_features, by_features


def weight_for_output(layer: CastsOperands, weight: Tensor, format: Format) -> Operand:
    """Cast the local weight for the output."""
    if isinstance(weight, QuantTensor):
        return weight.operand()
    return _cast_weight(layer, weight, layer.weight, format, for_output=True)


def weight_for_grad_input(layer: CastsOperands, weight: Tensor, source: Tensor | None, format: Format) -> Operand:
    """Cast the local weight for grad_input.

    Args:
        source: the parameter that forward used, whose local part is ``weight``; None: keep no copy.
    """
    if isinstance(weight, QuantTensor):
        return format.recast(weight.operand(), "weight")
    return _cast_weight(layer, weight, source, format, for_output=False)


def _cast_weight(
    layer: CastsOperands, weight: Tensor, source: Tensor | None, format: Format, *, for_output: bool
) -> Operand:
    use = WEIGHT if for_output else WEIGHT_FOR_GRAD_INPUT

    def make() -> Operand:
        return format.cast(weight, use, format.scale_from_state(layer, weight, "weight"))

    keep = layer.keep_weight and layer.training
    if not keep or source is None or torch.compiler.is_compiling() or source.is_inference():
        return make()
    key = WEIGHT if format.one_cast_serves_both(weight, "weight") else use
    copy: Operand = layer.copies.get(source, key, make, in_forward=for_output)
    return copy
