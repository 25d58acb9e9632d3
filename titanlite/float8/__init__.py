"""Float8 training and inference of linear layers, with torch alone. Names and modules are those of torchao.float8; the
implementation is in ``titanlite.quant``."""

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
    convert_to_float8_training,
    sync_float8_amax_and_scale_history,
    why_not_convertible,
)
from titanlite.float8.fsdp_utils import precompute_float8_dynamic_scale_for_fsdp
from titanlite.quant.linear import high_precision
from titanlite.quant.swiglu import swiglu_linear

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
