"""The last layer of a SwiGLU feed-forward block, fused with the product that is its input."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from titanlite.quant.autograd import QuantSwiGLUMatmul
from titanlite.quant.linear import QuantLinear
from titanlite.quant.operands import autocast, weight_for_output


def swiglu_linear(linear: nn.Module, gate: Tensor, up: Tensor) -> Tensor:
    """Return ``linear(silu(gate) * up)``, [..., out_features].

    If ``linear`` is quantized and its format has kernels for the product, the product is neither written nor saved for
    backward, and rounded once instead of twice. If the layer has hooks, which could see the product, it is computed and
    the layer is called. (A layer that FSDP2 shards by itself has hooks.)

    Args:
        gate, up: [..., in_features], of the same shape and dtype.
    """
    if isinstance(linear, QuantLinear) and linear.sharding is None and not _has_hooks(linear):
        out = _fused(linear, autocast(gate), autocast(up))
        if out is not None:
            return out if linear.bias is None else out + linear.bias.to(out.dtype)
    return linear(F.silu(gate) * up)  # type: ignore[no-any-return]


def _has_hooks(linear: nn.Module) -> bool:
    """Return whether calling ``linear`` does anything beside its class's forward."""
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks, linear._backward_pre_hooks)
    replaced = "forward" in linear.__dict__ or linear._compiled_call_impl is not None
    return replaced or any(len(kind) > 0 for kind in hooks) or _has_any_global_hook()


def _fused(linear: QuantLinear, gate: Tensor, up: Tensor) -> Tensor | None:
    """Return the output without the bias; None where the product has to be written."""
    if linear.in_high_precision or gate is up or (gate.shape, gate.dtype) != (up.shape, up.dtype):
        return None
    format = linear.format.on(up.device)
    if not format.fuses_swiglu(up):
        return None
    weight = linear.local_weight(up)
    x, saved = format.swiglu_cast(
        gate.detach().reshape(-1, gate.shape[-1]), up.detach().reshape(-1, up.shape[-1]), linear.learns(weight)
    )
    w = weight_for_output(linear, weight, format)
    out: Tensor = QuantSwiGLUMatmul.apply(gate, up, weight, *x, *w, saved, linear, format)
    return out
