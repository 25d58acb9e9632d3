"""The quantizer ``mxfp8_dynamic``, for a trained model's linear layers."""

from __future__ import annotations

from titanlite.converters.quantizers import dynamic_quantizer, register_quantizer
from titanlite.quant.mx.format import MXFormat

# No reader of compressed-tensors knows it.
register_quantizer("mxfp8_dynamic", dynamic_quantizer(MXFormat()))
