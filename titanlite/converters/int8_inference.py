"""The quantizers ``int8_dynamic`` and ``int8_weight_only``, for a trained model's linear layers."""

from __future__ import annotations

from titanlite.converters.quantizers import dynamic_quantizer, register_quantizer
from titanlite.quant.format import WEIGHT
from titanlite.quant.int8.format import Int8Format
from titanlite.quant.int8.weights import Int8Weights

_NUMBER = {"num_bits": 8, "type": "int", "symmetric": True}

register_quantizer(
    "int8_dynamic",
    dynamic_quantizer(
        Int8Format(("output",)),
        quantize_weight=lambda weight: Int8Format(("output",), emulate=True).cast(weight, WEIGHT),
        scheme={
            "weights": {**_NUMBER, "strategy": "channel", "dynamic": False},
            "input_activations": {**_NUMBER, "strategy": "token", "dynamic": True},
        },
        file_format="int-quantized",
    ),
)
# vLLM reads int8 weights with inputs in high precision only where they are packed into int32.
register_quantizer("int8_weight_only", dynamic_quantizer(Int8Weights()))
