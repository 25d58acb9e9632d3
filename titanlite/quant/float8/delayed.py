"""Static and delayed scales, which do not come from the tensor that is cast.

Delayed scaling (Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3) scales a tensor by the largest
amax of earlier steps, so that the cast need not wait for the tensor's own amax. Each operand with delayed scaling has
three buffers in its layer: ``fp8_amax_<operand>``, the largest amax since the last synchronization;
``fp8_amax_history_<operand>``, the amaxes of the last ``history_len`` steps, latest first; ``fp8_scale_<operand>``,
which is 0 until the first synchronization (until then the tensor's own amax is used).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from titanlite.quant.float8.casts import CastConfig, ScalingType
from titanlite.quant.float8.numerics import amax_of, amax_to_scale

AMAX, HISTORY, SCALE = "fp8_amax_", "fp8_amax_history_", "fp8_scale_"


def buffers(operand: str, history_len: int) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the buffers of an operand with delayed scaling."""
    return {f"{AMAX}{operand}": (), f"{HISTORY}{operand}": (history_len,), f"{SCALE}{operand}": ()}


def scale_of(layer: nn.Module, operand: str, config: CastConfig, x: Tensor, power_of_2: bool) -> Tensor | None:
    """Return the scale to cast ``x`` with; None if it is dynamic. In training, also record the amax of a delayed
    operand in the layer."""
    if config.scaling_type is ScalingType.STATIC:
        assert config.static_scale is not None
        return x.new_full((), config.static_scale, dtype=torch.float32)
    if config.scaling_type is not ScalingType.DELAYED:
        return None
    live = amax_of(x).float()
    if layer.training:
        amax = layer.get_buffer(f"{AMAX}{operand}")
        amax.copy_(torch.maximum(amax, live))
    scale = layer.get_buffer(f"{SCALE}{operand}")
    return torch.where(scale > 0, scale, amax_to_scale(live, config.dtype, power_of_2))
