"""The last layer of a SwiGLU feed-forward block, with its input cast as it is computed."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from titanlite.quant.autograd import QuantSwiGLUMatmul
from titanlite.quant.linear import QuantLinear, autocast


def swiglu_linear(linear: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """``linear(silu(gate) * up)``, [..., out_features].

    Where ``linear`` is a quantized layer whose format casts the product by kernels, the product is never written, nor
    kept for backward: ``gate`` and ``up`` are enough. It is then rounded once, not twice. Where anybody is to see the
    product, by hooks of the layer (FSDP2's of a layer that is sharded by itself are some), it is computed, and the
    layer called.

    Args:
        gate, up: [..., in_features], of one shape and dtype.
    """
    if isinstance(linear, QuantLinear) and linear.sharding is None and not _is_watched(linear):
        out = _multiplied(linear, autocast(gate), autocast(up))
        if out is not None:
            return out if linear.bias is None else out + linear.bias.to(out.dtype)
    return linear(F.silu(gate) * up)  # type: ignore[no-any-return]


def _is_watched(linear: nn.Module) -> bool:
    """Whether something else happens when ``linear`` is called than its own forward."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    replaced = "forward" in linear.__dict__ or linear._compiled_call_impl is not None
    return replaced or any(len(of_a_kind) > 0 for of_a_kind in hooks) or _has_any_global_hook()


def _multiplied(linear: QuantLinear, gate: Tensor, up: Tensor) -> Tensor | None:
    """The result without the bias; None where the product has to be written."""
    if linear.in_high_precision or gate is up or (gate.shape, gate.dtype) != (up.shape, up.dtype):
        return None
    format = linear.format.on(up.device)
    if not format.fuses_swiglu(up):
        return None
    weight = linear.local_weight(up)
    x, saved = format.swiglu_cast(
        gate.detach().reshape(-1, gate.shape[-1]), up.detach().reshape(-1, up.shape[-1]), linear.learns(weight)
    )
    w = linear.operands.weight_for_output(weight, format)
    out: Tensor = QuantSwiGLUMatmul.apply(gate, up, weight, *x, *w, saved, linear.operands, format)
    return out
