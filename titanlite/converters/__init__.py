"""Converters: named transformations of the model, listed in ``model.converters``."""

from titanlite.converters import float8 as float8  # imported because they register themselves
from titanlite.converters import float8_inference as float8_inference
from titanlite.converters import fused_norm as fused_norm
from titanlite.converters import int8 as int8
from titanlite.converters import int8_inference as int8_inference
from titanlite.converters import mx as mx
from titanlite.converters import mx_inference as mx_inference
from titanlite.converters.quantizers import Quantized, Quantizer, get_quantizer, quantizers, register_quantizer
from titanlite.converters.registry import (
    ModelConverter,
    build_converters,
    formats_with_units,
    native_formats,
    register_converter,
)

__all__ = [
    "ModelConverter",
    "Quantized",
    "Quantizer",
    "build_converters",
    "formats_with_units",
    "get_quantizer",
    "native_formats",
    "quantizers",
    "register_converter",
    "register_quantizer",
]
