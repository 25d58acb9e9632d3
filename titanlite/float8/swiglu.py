"""The last layer of a SwiGLU feed-forward block, with its input cast as it is computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from titanlite.float8 import kernels
from titanlite.float8.config import ScalingType
from titanlite.float8.linear import Float8Linear
from titanlite.float8.matmul import layout_of
from titanlite.float8.products import Float8SwiGLUMatmul


def swiglu_linear(linear: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``linear(silu(gate) * up)``, [..., out_features].

    Where ``linear`` is a :class:`Float8Linear` whose input is cast by kernels with dynamic scales, the product is never
    written, nor kept for backward: ``gate`` and ``up`` are enough. It is then rounded once, not twice. Where anybody is
    to see the product, by hooks of the layer (FSDP2's of a layer that is sharded by itself are some), it is computed,
    and the layer called.

    Args:
        gate, up: [..., in_features], of one shape and dtype.
    """
    if type(linear) is Float8Linear and not _is_watched(linear):
        out = _multiplied(linear, linear._autocast(gate), linear._autocast(up))
        if out is not None:
            return out if linear.bias is None else out + linear.bias.to(out.dtype)
    return linear(F.silu(gate) * up)  # type: ignore[no-any-return]


def _is_watched(linear: nn.Module) -> bool:
    """Whether something else happens when ``linear`` is called than its own forward."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    replaced = "forward" in linear.__dict__ or linear._compiled_call_impl is not None
    return replaced or any(len(of_a_kind) > 0 for of_a_kind in hooks) or _has_any_global_hook()


def _multiplied(linear: Float8Linear, gate: Tensor, up: Tensor) -> Tensor | None:
    """The result without the bias; None where the product has to be written."""
    first, second = linear.config.cast_config_input, linear.config.cast_config_input_for_grad_weight
    if not first.is_cast or first.scaling_type is not ScalingType.DYNAMIC or linear.in_high_precision:
        return None
    if gate is up or (gate.shape, gate.dtype) != (up.shape, up.dtype):
        return None
    weight, emulate, for_weight = linear._ready(up)
    if not linear._by_kernels(up, emulate):
        return None
    data, scale, amaxes = kernels.swiglu_cast(
        gate.detach().reshape(-1, gate.shape[-1]),
        up.detach().reshape(-1, up.shape[-1]),
        first.dtype,
        layout_of(first),
        layout_of(second) if for_weight else "none",
        linear.config.round_scales_to_power_of_2,
    )
    w = linear._weight_for_output(weight, linear.weight, emulate)
    out: Tensor = Float8SwiGLUMatmul.apply(gate, up, weight, data, scale, *w, amaxes, linear)
    return out
