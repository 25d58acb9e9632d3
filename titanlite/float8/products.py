"""The three matmuls of a float8 layer, as autograd takes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from titanlite.float8 import kernels
from titanlite.float8.matmul import Operand, layout_of, scaled_mm

if TYPE_CHECKING:
    from titanlite.float8.linear import Float8Linear


class Ranks(Protocol):
    """The ranks of a row-parallel layer, each of which has a part of its input features.

    What they communicate is part of the matmul: its backward takes the gradient in float8 as it arrives, which autograd
    could not hand on.
    """

    def sum(self, output: Tensor) -> Tensor:
        """The sum over the ranks, or this rank's share of it."""

    def whole(self, grad: Tensor) -> Tensor | Operand:
        """The gradient of the whole sum, made of the gradient of what :meth:`sum` returned."""


class Float8Matmul(torch.autograd.Function):
    """``x @ weight.T`` and its two gradients.

    ``x`` is there for autograd alone: the output is computed from its cast, and what backward needs of it is saved as
    the cast for grad_weight, one byte per element. ``weight`` is saved as it is, which costs nothing: it is a parameter
    (and under FSDP2 freed and gathered again in between).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        x_data: Tensor,
        x_scale: Tensor | None,
        w_data: Tensor,
        w_scale: Tensor | None,
        saved_data: Tensor | None,
        saved_scale: Tensor | None,
        layer: Float8Linear,
        emulate: bool,
        ranks: Ranks | None,
    ) -> Tensor:
        if saved_data is None:
            saved_data, saved_scale = x_data, x_scale
        if weight.requires_grad:
            ctx.save_for_backward(weight, saved_data, saved_scale)
        else:
            ctx.save_for_backward(weight)
        ctx.ranks = ranks
        _remember(ctx, layer, x, emulate)
        out = _output(ctx, Operand(x_data, x_scale), Operand(w_data, w_scale))
        return out if ranks is None else ranks.sum(out)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        _begin_backward(ctx)
        grad_input = grad_weight = None
        whole = grad_output if ctx.ranks is None else ctx.ranks.whole(grad_output)
        g_for_input, g_for_weight = ctx.layer._cast_grad_output(whole, ctx.emulate, ctx.needs_input_grad[1])
        if ctx.needs_input_grad[0]:
            grad_input = _grad_input(ctx, g_for_input, weight).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = _grad_weight(ctx, g_for_weight, Operand(*saved))
        return grad_input, grad_weight, *[None] * 9


class Float8SwiGLUMatmul(torch.autograd.Function):
    """``(silu(gate) * up) @ weight.T`` and its gradients, by kernels.

    The product of SwiGLU, as large as ``gate`` and ``up``, which are kept anyway, is neither written nor kept: backward
    makes the copy of it that grad_weight takes while it reads both for their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        data: Tensor,
        scale: Tensor,
        w_data: Tensor,
        w_scale: Tensor,
        amaxes: Tensor,
        layer: Float8Linear,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight, amaxes)
        _remember(ctx, layer, up, emulate=False)
        return _output(ctx, Operand(data, scale), Operand(w_data, w_scale))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, amaxes = ctx.saved_tensors
        _begin_backward(ctx)
        config = ctx.layer.config
        for_gate, for_up, for_weight, *_ = ctx.needs_input_grad
        g_for_input, g_for_weight = ctx.layer._cast_grad_output(grad_output, False, for_weight)
        how = config.cast_config_input_for_grad_weight
        gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        # Without factors that learn, the kernel makes gradients of anything, for nobody, and the copy.
        grad = _grad_input(ctx, g_for_input, weight) if for_gate or for_up else torch.empty_like(up)
        grad_gate, grad_up, data, scale = kernels.swiglu_backward(
            grad,
            gate,
            up,
            amaxes,
            how.dtype,
            "none" if not for_weight else layout_of(how) if how.is_cast else "high_precision",
            config.round_scales_to_power_of_2,
        )
        grad_weight = None
        if for_weight:
            product = Operand(data.t(), scale) if how.is_cast else Operand(data, None)
            grad_weight = _grad_weight(ctx, g_for_weight, product)
        found = (of.view(ctx.shape) if wanted else None for of, wanted in ((grad_gate, for_gate), (grad_up, for_up)))
        return *found, grad_weight, *[None] * 6


def _remember(ctx: Any, layer: Float8Linear, x: Tensor, emulate: bool) -> None:
    """What the backward of a matmul with the input ``x`` needs beside tensors."""
    ctx.source = None if torch.compiler.is_compiling() else layer.weight
    ctx.layer, ctx.emulate, ctx.shape, ctx.dtype = layer, emulate, x.shape, x.dtype


def _output(ctx: Any, x: Operand, w: Operand) -> Tensor:
    fast_accum = ctx.layer.config.gemm_config_output.use_fast_accum
    out = scaled_mm(x, w.t(), out_dtype=ctx.dtype, fast_accum=fast_accum, emulate=ctx.emulate)
    # Not a view in the eyes of autograd, as of F.linear: FSDP2 warns of modules that return one.
    return torch.ops.aten._unsafe_view(out, [*ctx.shape[:-1], out.shape[-1]])  # type: ignore[no-any-return]


def _begin_backward(ctx: Any) -> None:
    if not torch.compiler.is_compiling():
        ctx.layer._copies.backward_ran = True
        refuse_double_backward()


def refuse_double_backward() -> None:
    """For the backward of a cast matmul, which is not differentiable itself: gradients of it would lack terms."""
    if torch.is_grad_enabled():
        raise RuntimeError("a float8 layer has no second derivative: leave out create_graph=True, or convert it back")


def _grad_input(ctx: Any, grad_output: Operand, weight: Tensor) -> Tensor:
    w = ctx.layer._weight_for_grad_input(weight, ctx.source, ctx.emulate)
    fast_accum = ctx.layer.config.gemm_config_grad_input.use_fast_accum
    return scaled_mm(grad_output, w, out_dtype=ctx.dtype, fast_accum=fast_accum, emulate=ctx.emulate)


def _grad_weight(ctx: Any, grad_output: Operand, x: Operand) -> Tensor:
    fast_accum = ctx.layer.config.gemm_config_grad_weight.use_fast_accum
    return scaled_mm(grad_output.t(), x, out_dtype=ctx.dtype, fast_accum=fast_accum, emulate=ctx.emulate)
