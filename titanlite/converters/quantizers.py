"""The interface of quantizers of a trained model for inference, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from titanlite.quant.format import Format, Operand
from titanlite.quant.inference import quantized_for_good
from titanlite.registry import Registry


class Quantized(NamedTuple):
    """The tensors of a quantized layer in files.

    Attributes:
        weight: (out_features, in_features), 8 bits per element.
        weight_scale: float32, the multiplier that dequantizes: (1,) or (out_features, 1).
        input_scale: float32, (1,), the multiplier that dequantizes the input, if it is static; else None.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None


@dataclass(frozen=True)
class Quantizer:
    """A way to quantize linear layers.

    Attributes:
        scheme: an entry of ``config_groups``, without the targets, of compressed-tensors, the format that vLLM and
            transformers read.
        file_format: compressed-tensors' name for the format of the tensors; None: no reader knows it, and the quantizer
            is for a model in memory alone.
        why_not: ``(in_features, out_features)`` -> why a layer of this size cannot be quantized; None if it can.
        calibrate: None, or ``(model)`` -> a context that records the amax of each linear layer's input, by name, while
            batches run through the model.
        quantize: ``(model, layer names, recorded amaxes or None)``: quantizes these layers in place.
        quantize_weight: a weight (out_features, in_features) -> ``weight`` and ``weight_scale`` of :class:`Quantized`.
        input_scale: the amax of a layer's input, a scalar -> ``input_scale`` of :class:`Quantized`, if it is static.
        restore: ``(linear layer, its tensors in the files)``: turns it into a quantized layer, in place.
    """

    scheme: Mapping[str, Any]
    file_format: str | None
    why_not: Callable[[int, int], str | None]
    quantize: Callable[[nn.Module, set[str], Mapping[str, Tensor] | None], object]
    quantize_weight: Callable[[Tensor], tuple[Tensor, Tensor]]
    input_scale: Callable[[Tensor], Tensor]
    restore: Callable[[nn.Linear, Quantized], None]
    calibrate: Callable[[nn.Module], AbstractContextManager[dict[str, Tensor]]] | None = None


_registry: Registry[Quantizer] = Registry("way to quantize", "--quantize")
register_quantizer = _registry.add
get_quantizer = _registry.get


def quantizers() -> Iterator[Quantizer]:
    return map(_registry.get, _registry.names())


def dynamic_quantizer(
    format: Format,
    *,
    quantize_weight: Callable[[Tensor], Operand] | None = None,
    scheme: Mapping[str, Any] | None = None,
    file_format: str | None = None,
) -> Quantizer:
    """Return the way to quantize whose layers compute their output in ``format``, with scales from the input alone.

    Args:
        quantize_weight, scheme, file_format: see :class:`Quantizer`; None: no reader of files knows the format.
    """

    def quantize(model: nn.Module, layers: set[str], record: object) -> None:
        chosen = [(name, module) for name, module in model.named_modules() if name in layers]
        for name, module in chosen:
            assert isinstance(module, nn.Linear)
            if reason := format.why_not(module.in_features, module.out_features):
                raise ValueError(f"{name}: {reason}")
            quantized_for_good(module, format)

    def as_stored(weight: Tensor) -> tuple[Tensor, Tensor]:
        assert quantize_weight is not None
        data, scale = quantize_weight(weight)
        assert scale is not None
        return data, scale

    def restore(layer: nn.Linear, stored: Quantized) -> None:
        quantized_for_good(layer, format, Operand(stored.weight, stored.weight_scale.float()))

    return Quantizer(
        scheme=scheme or {},
        file_format=file_format,
        why_not=format.why_not,
        quantize=quantize,
        quantize_weight=as_stored,
        input_scale=lambda amax: amax,
        restore=restore,
    )
