"""FSDP2's all-gather in float8, with torchao's names."""

from titanlite.quant.fsdp import precompute_scales as precompute_float8_dynamic_scale_for_fsdp

__all__ = ["precompute_float8_dynamic_scale_for_fsdp"]
