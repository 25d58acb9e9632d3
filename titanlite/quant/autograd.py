"""The three matmuls of a layer as autograd functions."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from titanlite.quant.agreement import NO_AGREEMENT, Agreement, Shards
from titanlite.quant.format import WEIGHT_FOR_GRAD_INPUT, Format, Operand
from titanlite.quant.operands import (
    CastsOperands,
    cast_grad_output,
    uses_of,
    weight_for_grad_input,
    weight_is_cast,
)


class Ranks(Protocol):
    """The communication of a row-parallel layer, each rank of which has a part of the input features.

    It happens inside the matmul, because the backward gathers the gradient in the format, and autograd cannot pass
    such a gradient on.
    """

    def sum(self, output: Tensor) -> Tensor:
        """Return the sum of ``output`` over the ranks, or this rank's share of the sum."""

    def whole(self, grad: Tensor) -> Tensor | Operand:
        """Return the gradient of the whole sum, given the gradient of the result of :meth:`sum`."""


class QuantMatmul(torch.autograd.Function):
    """The matmul ``x @ weight.T`` and its two gradients.

    ``x`` itself is passed for autograd only: the output is computed from its cast, and backward saves its cast for
    grad_weight, one byte per element. Saving ``weight`` costs no memory, because it is a parameter (under FSDP2, freed
    after forward and gathered again).
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
        weight_amax: Tensor | None,
        layer: CastsOperands,
        format: Format,
        ranks: Ranks | None,
        shards: Shards | None,
    ) -> Tensor:
        if saved_data is None:
            saved_data, saved_scale = x_data, x_scale
        # The amax that ranks agreed on serves the other cast of the weight too.
        amax = weight_amax if format.shares_amax("weight") else None
        if weight.requires_grad:
            ctx.save_for_backward(weight, amax, saved_data, saved_scale)
        else:
            ctx.save_for_backward(weight, amax)
        ctx.ranks, ctx.shards = ranks, shards
        _save(ctx, layer, format, x)
        out = _output(ctx, Operand(x_data, x_scale), Operand(w_data, w_scale))
        return out if ranks is None else ranks.sum(out)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        weight, amax, *saved = ctx.saved_tensors
        _begin_backward(ctx)
        grad_input = grad_weight = None
        whole = grad_output if ctx.ranks is None else ctx.ranks.whole(grad_output)
        agreement = _agree(ctx, whole, weight, amax)
        learns = ctx.needs_input_grad[1]
        g_for_input, g_for_weight = cast_grad_output(ctx.layer, whole, ctx.format, learns, agreement)
        if ctx.needs_input_grad[0]:
            amax = agreement.get(WEIGHT_FOR_GRAD_INPUT) if amax is None else amax
            grad_input = _grad_input(ctx, g_for_input, weight, amax).view(ctx.shape)
        if learns:
            grad_weight = _grad_weight(ctx, g_for_weight, Operand(*saved))
        return grad_input, grad_weight, *[None] * 11


class QuantSwiGLUMatmul(torch.autograd.Function):
    """The matmul ``(silu(gate) * up) @ weight.T`` and its gradients, by the format's kernels.

    The product ``silu(gate) * up`` is never written nor saved, because ``gate`` and ``up`` are saved anyway: backward
    recomputes its cast for grad_weight in the pass that computes their gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Tensor,
        x_data: Tensor,
        x_scale: Tensor,
        w_data: Tensor,
        w_scale: Tensor,
        saved: Tensor,
        layer: CastsOperands,
        format: Format,
    ) -> Tensor:
        ctx.save_for_backward(gate, up, weight, saved)
        _save(ctx, layer, format, up)
        return _output(ctx, Operand(x_data, x_scale), Operand(w_data, w_scale))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight, saved = ctx.saved_tensors
        _begin_backward(ctx)
        for_gate, for_up, for_weight, *_ = ctx.needs_input_grad
        g_for_input, g_for_weight = cast_grad_output(ctx.layer, grad_output, ctx.format, for_weight)
        gate, up = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
        # If neither factor needs a gradient, only the kernel's product is used, and ``grad`` may hold anything.
        grad = _grad_input(ctx, g_for_input, weight) if for_gate or for_up else torch.empty_like(up)
        grad_gate, grad_up, product = ctx.format.swiglu_backward(grad, gate, up, saved, for_weight)
        grad_weight = None if product is None else _grad_weight(ctx, g_for_weight, product)
        return (
            grad_gate.view(ctx.shape) if for_gate else None,
            grad_up.view(ctx.shape) if for_up else None,
            grad_weight,
            *[None] * 7,
        )


def _save(ctx: Any, layer: CastsOperands, format: Format, x: Tensor) -> None:
    """Store on ``ctx`` what the backward needs beside the saved tensors."""
    ctx.source = layer.kept_source()
    ctx.layer, ctx.format, ctx.shape, ctx.dtype = layer, format, x.shape, x.dtype


def _output(ctx: Any, x: Operand, w: Operand) -> Tensor:
    out = ctx.format.multiply(x, w.t(), "output", ctx.dtype)
    # Like F.linear, return no view as autograd sees it: FSDP2 warns about modules that return one.
    return torch.ops.aten._unsafe_view(out, [*ctx.shape[:-1], out.shape[-1]])  # type: ignore[no-any-return]


def _begin_backward(ctx: Any) -> None:
    if not torch.compiler.is_compiling():
        ctx.layer.copies.backward_ran = True
        refuse_double_backward(ctx.format.name)


def refuse_double_backward(format_name: str) -> None:
    """Raise a RuntimeError if this backward builds a graph: a second derivative of a cast matmul would lack terms."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"a {format_name} layer has no second derivative: leave out create_graph=True, or keep the layer in high "
            "precision"
        )


def _agree(ctx: Any, grad_output: Tensor | Operand, weight: Tensor, amax: Tensor | None) -> Agreement:
    """Begin to agree with the other ranks on the amaxes of the operands of backward. ``amax`` is that of the weight, if
    forward has it."""
    if ctx.shards is None:
        return NO_AGREEMENT
    casts = []
    if isinstance(grad_output, Tensor):
        casts.append((grad_output, uses_of("grad_output", ctx.needs_input_grad[1])))
    needs_weight = ctx.needs_input_grad[0] and amax is None
    if needs_weight and not weight_is_cast(ctx.layer, weight, ctx.source, ctx.format, for_output=False):
        casts.append((weight, (WEIGHT_FOR_GRAD_INPUT,)))
    return Agreement(ctx.shards, ctx.format, casts)


def _grad_input(ctx: Any, grad_output: Operand, weight: Tensor, amax: Tensor | None = None) -> Tensor:
    w = weight_for_grad_input(ctx.layer, weight, ctx.source, ctx.format, amax)
    return ctx.format.multiply(grad_output, w, "grad_input", ctx.dtype)  # type: ignore[no-any-return]


def _grad_weight(ctx: Any, grad_output: Operand, x: Operand) -> Tensor:
    return ctx.format.multiply(grad_output.t(), x, "grad_weight", ctx.dtype)  # type: ignore[no-any-return]
