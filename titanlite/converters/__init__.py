"""Converters: named transformations of the model, listed in ``model.converters``."""

from titanlite.converters import fused_norm as fused_norm  # registers itself
from titanlite.converters.registry import ModelConverter, build_converters, register_converter

__all__ = ["ModelConverter", "build_converters", "register_converter"]
