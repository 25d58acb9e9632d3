"""Float8 training and inference of linear layers and grouped matmuls, with torch alone. Names and modules are those of
torchao.float8; the implementation is in ``titanlite.quant``."""

from titanlite.float8.config import (
    CastConfig,
    DelayedScalingConfig,
    Float8GemmConfig,
    Float8LinearConfig,
    Float8LinearRecipeName,
    ScalingGranularity,
    ScalingType,
)
from titanlite.float8.float8_linear import Float8Linear
from titanlite.float8.float8_linear_utils import (
    _auto_filter_for_recipe,
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
    why_not_convertible,
)
from titanlite.float8.fsdp_utils import precompute_float8_dynamic_scale_for_fsdp
from titanlite.float8.inference import Float8MMConfig
from titanlite.float8.moe import convert_moe_to_float8_training
from titanlite.float8.types import FP8Granularity
from titanlite.quant.linear import high_precision
from titanlite.quant.reuse import share_casts
from titanlite.quant.swiglu import swiglu_linear

__all__ = [
    "CastConfig",
    "DelayedScalingConfig",
    "FP8Granularity",
    "Float8GemmConfig",
    "Float8Linear",
    "Float8LinearConfig",
    "Float8LinearRecipeName",
    "Float8MMConfig",
    "ScalingGranularity",
    "ScalingType",
    "_auto_filter_for_recipe",
    "convert_moe_to_float8_training",
    "convert_to_float8_training",
    "high_precision",
    "precompute_float8_dynamic_scale_for_fsdp",
    "share_casts",
    "swiglu_linear",
    "sync_float8_amax_and_scale_history",
    "why_not_convertible",
]
