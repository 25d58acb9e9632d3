"""Converters: named transformations of the model, listed in ``model.converters``."""

from titanlite.converters import float8 as float8  # these register themselves
from titanlite.converters import fused_norm as fused_norm
from titanlite.converters.registry import ModelConverter, build_converters, native_formats, register_converter

__all__ = ["ModelConverter", "build_converters", "native_formats", "register_converter"]
