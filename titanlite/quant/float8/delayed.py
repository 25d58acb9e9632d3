"""Static and delayed scales: those that do not come from the tensor at hand.

Delayed scaling (Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3) scales a tensor by the largest
amax of the steps before, so that its cast need not wait for its own amax. Each operand so scaled has three buffers in
its layer: ``fp8_amax_<operand>``, the largest amax since the last synchronization; ``fp8_amax_history_<operand>``,
those of the last ``history_len`` steps, latest first; ``fp8_scale_<operand>``, 0 until the first synchronization, while
the live amax is used.
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
    """Return the scale to cast ``x`` with, None where it is dynamic. In training, the amax of a delayed operand is
    noted in the layer."""
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
