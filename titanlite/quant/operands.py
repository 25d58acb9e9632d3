"""The operands of one layer: each is cast once for all matmuls, microbatches and layers that can share the cast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlite.quant.agreement import NO_AGREEMENT, Agreement
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

    def kept_source(self) -> Tensor | None:
        """Return the parameter whose casts are to be kept; None if they are not, or if the weight is computed."""
        weight = self._parameters.get("weight")
        keep = self.keep_weight and self.training and not torch.compiler.is_compiling()
        return weight if keep and weight is not None and not weight.is_inference() else None


def uses_of(operand: OperandName, for_weight: bool) -> tuple[Use, ...]:
    """Return the uses of an activation: for the matmul that contracts its features and, if ``for_weight``, the one that
    contracts its rows."""
    return (Use(operand, 1), Use(operand, 0)) if for_weight else (Use(operand, 1),)


def autocast(input: Tensor) -> Tensor:
    """Return ``input``, cast to autocast's dtype if autocast is enabled."""
    # (is_autocast_enabled does not know the meta device; torch 2.11 cannot compile is_autocast_available.)
    if not input.is_meta and torch.is_autocast_enabled(input.device.type):
        return input.to(torch.get_autocast_dtype(input.device.type))
    return input


def cast_input(
    layer: CastsOperands, x: Tensor, format: Format, for_weight: bool, agreement: Agreement = NO_AGREEMENT
) -> tuple[Operand, Operand]:
    """Cast the input for the output and, if ``for_weight``, for grad_weight. The two are the same object where one cast
    serves both. Layers that take an input of :func:`titanlite.quant.reuse.share_casts` share its casts.

    Args:
        x: [..., in_features].
        agreement: the amaxes that ranks agreed on.
    """
    options = format.input_key()
    key = (type(format), options, for_weight, tuple(agreement.amaxes))
    if options is not None:
        casts: tuple[Operand, Operand] | None = remembered(x, key)
        if casts is not None:
            return casts
    operand = x.operand() if isinstance(x, QuantTensor) else x
    casts = _cast_activation(layer, operand, "input", format, for_weight, agreement)
    if options is not None:
        remember(x, key, casts)
    return casts


def cast_grad_output(
    layer: CastsOperands, grad: Tensor | Operand, format: Format, for_weight: bool, agreement: Agreement = NO_AGREEMENT
) -> tuple[Operand, Operand]:
    """Cast the gradient of the output, [..., out_features], for grad_input and, if ``for_weight``, grad_weight."""
    return _cast_activation(layer, grad, "grad_output", format, for_weight, agreement)


def _cast_activation(
    layer: CastsOperands,
    x: Tensor | Operand,
    operand: OperandName,
    format: Format,
    for_weight: bool,
    agreement: Agreement,
) -> tuple[Operand, Operand]:
    if isinstance(x, Operand):  # it was gathered in the format
        by_features = format.arrived(x)
        return by_features, format.recast(x, operand) if for_weight else by_features
    x = x.detach().reshape(-1, x.shape[-1])
    scale = format.scale_from_state(layer, x, operand)
    amaxes = agreement.get(Use(operand, 1)), agreement.get(Use(operand, 0))
    if for_weight:
        return format.cast_both(x, operand, scale, amaxes)
    by_features = format.cast(x, Use(operand, 1), scale, amaxes[0])
    return by_features, by_features


def weight_is_cast(
    layer: CastsOperands, weight: Tensor, source: Tensor | None, format: Format, *, for_output: bool
) -> bool:
    """Return whether the cast of the local weight is there already: gathered, or kept for ``source``, the parameter."""
    if isinstance(weight, QuantTensor):
        return True
    return source is not None and layer.copies.has(source, _key(weight, format, for_output), in_forward=for_output)


def weight_for_output(
    layer: CastsOperands, weight: Tensor, format: Format, agreement: Agreement = NO_AGREEMENT
) -> Operand:
    """Cast the local weight for the output."""
    if isinstance(weight, QuantTensor):
        return format.arrived(weight.operand())
    return _cast_weight(layer, weight, layer.kept_source(), format, agreement.get(WEIGHT), for_output=True)


def weight_for_grad_input(
    layer: CastsOperands, weight: Tensor, source: Tensor | None, format: Format, amax: Tensor | None = None
) -> Operand:
    """Cast the local weight for grad_input.

    Args:
        source: the parameter that forward used, whose local part is ``weight``; None: keep no copy.
        amax: the amaxes that ranks agreed on.
    """
    if isinstance(weight, QuantTensor):
        return format.recast(weight.operand(), "weight")
    return _cast_weight(layer, weight, source, format, amax, for_output=False)


def _key(weight: Tensor, format: Format, for_output: bool) -> Use:
    return WEIGHT if for_output or format.one_cast_serves_both(weight, "weight") else WEIGHT_FOR_GRAD_INPUT


def _cast_weight(
    layer: CastsOperands,
    weight: Tensor,
    source: Tensor | None,
    format: Format,
    amax: Tensor | None,
    *,
    for_output: bool,
) -> Operand:
    use = WEIGHT if for_output else WEIGHT_FOR_GRAD_INPUT

    def make() -> Operand:
        return format.cast(weight, use, format.scale_from_state(layer, weight, "weight"), amax)

    if source is None:
        return make()
    copy: Operand = layer.copies.get(source, _key(weight, format, for_output), make, in_forward=for_output)
    return copy
