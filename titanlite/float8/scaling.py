"""Static and delayed scales: those that do not come from the tensor at hand.

Delayed scaling (Micikevicius et al., "FP8 Formats for Deep Learning", 2022, section 3) scales a tensor by the largest
amax of the steps before, so that its cast need not wait for its own amax. Each operand so scaled has three buffers in
its layer: ``fp8_amax_<operand>``, the largest amax since the last synchronization; ``fp8_amax_history_<operand>``,
those of the last ``history_len`` steps, latest first; ``fp8_scale_<operand>``, 0 until the first synchronization, while
the live amax is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titanlite.float8.config import CastConfig, ScalingType
from titanlite.float8.numerics import amax_of, amax_to_scale

if TYPE_CHECKING:
    from titanlite.float8.linear import Float8Linear

OPERANDS = ("input", "weight", "grad_output")
AMAX, HISTORY, SCALE = "fp8_amax_", "fp8_amax_history_", "fp8_scale_"


def is_stateful(config: CastConfig) -> bool:
    return config.scaling_type in (ScalingType.DELAYED, ScalingType.STATIC)


def delayed_operands(layer: Float8Linear) -> list[str]:
    return [o for o in OPERANDS if _config(layer, o).scaling_type is ScalingType.DELAYED]


def _config(layer: Float8Linear, operand: str) -> CastConfig:
    config: CastConfig = getattr(layer.config, f"cast_config_{operand}")
    return config


def add_buffers(layer: Float8Linear) -> None:
    """The state of the layer's delayed operands, on its weight's device."""
    device = layer.weight.device
    for operand in delayed_operands(layer):
        history = torch.zeros(layer.config.delayed_scaling_config.history_len, device=device)
        layer.register_buffer(f"{AMAX}{operand}", torch.zeros((), device=device))
        layer.register_buffer(f"{HISTORY}{operand}", history)
        layer.register_buffer(f"{SCALE}{operand}", torch.zeros((), device=device))


def buffer_names(layer: Float8Linear, operand: str | None = None) -> list[str]:
    """Of one operand, or of all."""
    operands = delayed_operands(layer) if operand is None else [operand]
    return [f"{prefix}{operand}" for operand in operands for prefix in (AMAX, HISTORY, SCALE)]


def scale_of(layer: Float8Linear, operand: str, config: CastConfig, x: Tensor) -> Tensor | None:
    """The scale to cast ``x`` with, None where it is dynamic. In training, the amax of a delayed operand is noted."""
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
    return torch.where(scale > 0, scale, amax_to_scale(live, config.dtype, layer.config.round_scales_to_power_of_2))


@torch.no_grad()
def sync_float8_amax_and_scale_history(
    model: nn.Module, fp8_layers: list[Float8Linear] | None = None, *, group: dist.ProcessGroup | None = None
) -> None:
    """End a step of delayed scaling: agree on this step's amaxes over the processes (one all-reduce for all layers),
    put them into the histories, and compute the scales of the next step. To be called after backward.

    An amax that is not finite or of nothing (zero, or a layer not used) leaves its history as it is: one bad step does
    not spoil the next ``history_len``.

    Args:
        fp8_layers: the layers, where the caller has them already; None finds them in ``model``.
        group: of the processes that hold these layers, by default all.
    """
    layers = float8_layers(model) if fp8_layers is None else fp8_layers
    states = [(layer, operand) for layer in layers for operand in delayed_operands(layer)]
    if not states:
        return
    amaxes = [layer.get_buffer(f"{AMAX}{operand}") for layer, operand in states]
    amax = torch.stack(amaxes)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    seen = amax.isfinite() & (amax > 0)
    for i, (layer, operand) in enumerate(states):
        history = layer.get_buffer(f"{HISTORY}{operand}")
        moved = torch.cat([amax[i : i + 1], history[:-1]])
        history.copy_(torch.where(seen[i], moved, history))
    largest = torch.stack([layer.get_buffer(f"{HISTORY}{operand}").amax() for layer, operand in states])
    for i, (layer, operand) in enumerate(states):
        config = _config(layer, operand)
        scale = amax_to_scale(largest[i], config.dtype, layer.config.round_scales_to_power_of_2)
        layer.get_buffer(f"{SCALE}{operand}").copy_(torch.where(largest[i] > 0, scale, 0.0))
        layer.forget_copies()  # they have the old scale
    torch._foreach_zero_(amaxes)


def float8_layers(model: nn.Module) -> list[Float8Linear]:
    from titanlite.float8.linear import Float8Linear  # which stands on this module

    return [module for module in model.modules() if isinstance(module, Float8Linear)]
