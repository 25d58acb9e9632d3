"""Ways to quantize a trained model for inference, and the registry of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from titanlite.registry import Registry


class Quantized(NamedTuple):
    """The tensors of a quantized layer in files.

    Attributes:
        weight: (out_features, in_features), 8 bits an element.
        weight_scale: float32, the multiplier that dequantizes: (1,) or (out_features, 1).
        input_scale: float32 (1,), that of the input where it is static; else None.
    """

    weight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None


@dataclass(frozen=True)
class Quantizer:
    """A way to quantize linear layers.

    Attributes:
        scheme: in the words of compressed-tensors, the format that vLLM and transformers read: an entry of its
            ``config_groups``, without the targets.
        file_format: the name of that format of the tensors.
        why_not: ``(in_features, out_features)`` -> why a layer cannot be quantized so; None if it can.
        calibrate: None, or what records the largest magnitudes of the inputs of the layers in a model, by name, while
            batches run through it.
        quantize: ``(model, chosen layer names, the record or None)``: quantizes these layers in place.
        quantize_weight: a weight (out_features, in_features) -> what the files hold of it, the first two of
            :class:`Quantized`.
        input_scale: the largest magnitude of a layer's input, a scalar -> the third, where the input's scale is static.
        restore: ``(linear layer, what the files hold of it)``: makes it a quantized layer, in place.
    """

    scheme: Mapping[str, Any]
    file_format: str
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
