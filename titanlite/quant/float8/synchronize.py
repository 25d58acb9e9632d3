"""The synchronization at the end of a step of delayed scaling."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from titanlite.quant.float8.delayed import AMAX, HISTORY, SCALE
from titanlite.quant.float8.format import Float8Format
from titanlite.quant.float8.numerics import amax_to_scale
from titanlite.quant.linear import QuantLinear, quant_layers


@torch.no_grad()
def sync_float8_amax_and_scale_history(
    model: nn.Module, fp8_layers: Iterable[QuantLinear] | None = None, *, group: dist.ProcessGroup | None = None
) -> None:
    """End a step of delayed scaling: take this step's largest amaxes over the processes (one all-reduce for all
    layers), add them to the histories, and compute the scales of the next step. Call it after backward.

    An amax that is zero or not finite is not added, so that one bad step does not spoil the next ``history_len``.

    Args:
        fp8_layers: the layers, if the caller has them already; None: those in ``model``.
        group: the processes that hold these layers; None: all.
    """
    states = [
        (layer, layer.format, operand)
        for layer in (quant_layers(model) if fp8_layers is None else fp8_layers)
        if isinstance(layer.format, Float8Format)
        for operand in layer.format.delayed_operands()
    ]
    if not states:
        return
    amaxes = [layer.get_buffer(f"{AMAX}{operand}") for layer, _, operand in states]
    amax = torch.stack(amaxes)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
    valid = amax.isfinite() & (amax > 0)
    for i, (layer, _, operand) in enumerate(states):
        history = layer.get_buffer(f"{HISTORY}{operand}")
        shifted = torch.cat([amax[i : i + 1], history[:-1]])
        history.copy_(torch.where(valid[i], shifted, history))
    largest = torch.stack([layer.get_buffer(f"{HISTORY}{operand}").amax() for layer, _, operand in states])
    for i, (layer, format, operand) in enumerate(states):
        scale = amax_to_scale(largest[i], getattr(format, operand)[0].dtype, format.power_of_2)
        layer.get_buffer(f"{SCALE}{operand}").copy_(torch.where(largest[i] > 0, scale, 0.0))
        layer.forget_copies()  # the copies have the old scale
    torch._foreach_zero_(amaxes)
