"""Float8 training and inference of linear layers, on torch alone. The names are torchao.float8's."""

from titanlite.float8.config import (
    CastConfig,
    DelayedScalingConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from titanlite.float8.convert import convert_to_float8_training, high_precision
from titanlite.float8.fsdp import precompute_float8_dynamic_scale_for_fsdp
from titanlite.float8.linear import Float8Linear, why_not_convertible
from titanlite.float8.scaling import sync_float8_amax_and_scale_history
from titanlite.float8.swiglu import swiglu_linear

__all__ = [
    "CastConfig",
    "DelayedScalingConfig",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "ScalingGranularity",
    "ScalingType",
    "convert_to_float8_training",
    "high_precision",
    "precompute_float8_dynamic_scale_for_fsdp",
    "swiglu_linear",
    "sync_float8_amax_and_scale_history",
    "why_not_convertible",
]
