"""The grouped matmul in a number format, differentiable: a matrix for each group of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from titanlite.quant.autograd import refuse_double_backward
from titanlite.quant.convertible import HIGH_PRECISION
from titanlite.quant.format import WEIGHT, WEIGHT_FOR_GRAD_INPUT, Operand, Use
from titanlite.quant.groups import GroupedFormat
from titanlite.quant.recipes import grouped_format
from titanlite.quant.reuse import remember, remembered


def quantized_grouped_mm(a: Tensor, b: Tensor, offsets: Tensor, recipe: str | GroupedFormat) -> Tensor:
    """Return ``torch.nn.functional.grouped_mm(a, b, offs=offsets)``, with all three of its matmuls in a number format.

    Each operand is cast along the dimension that its matmul contracts, and group by group: the rows of one group never
    change the scale of another. Where the device has no units for this, the same quantized values are multiplied in
    float32.

    Args:
        a: [rows, k], in bfloat16, float16, float32 or float64; the rows of a group lie one after the other.
        b: [groups, k, m], in the dtype of ``a``: a matrix for each group, in any memory layout.
        offsets: the end of each group in the rows, int32 [groups], on the device of the others. A group can be empty,
            and of any size.
        recipe: a name of :data:`titanlite.quant.recipes.GROUPED_RECIPES`, or a format.

    Returns:
        [rows, m], in the dtype of ``a``. Rows after the last group are not defined.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together, sizes that the format does not take, an unknown
            recipe, or ends of groups that fall or are after the last row. The ends are checked on the CPU, and not in
            compiled code: on a GPU, the host would have to wait for them.
    """
    format = grouped_format(recipe) if isinstance(recipe, str) else recipe
    _check(a, b, offsets)
    if reason := format.why_not_grouped() or format.why_not(b.shape[1], b.shape[2]):
        raise ValueError(f"quantized_grouped_mm: b {tuple(b.shape)} in {format.name}: {reason}")
    format = format.for_groups(a.device, a.dtype)
    rows, columns = _cast_input(a, offsets, format, b.requires_grad and torch.is_grad_enabled())
    return _GroupedMatmul.apply(a, b, offsets, *rows, *columns, format)  # type: ignore[no-any-return]


def _cast_input(a: Tensor, offsets: Tensor, format: GroupedFormat, for_weight: bool) -> tuple[Operand, Operand]:
    """Cast ``a`` for the output and, if ``for_weight``, for grad_weight. Matmuls that take an input of
    :func:`titanlite.quant.reuse.share_casts` with the same groups share its casts."""
    options = None if torch.compiler.is_compiling() else format.input_key()
    key: Any = None
    if options is not None:
        key = type(format), options, format.emulate, for_weight, id(offsets), offsets._version
        shared = remembered(a, key)
        if shared is not None:
            rows, columns, _ = shared
            return rows, columns
    with torch.no_grad():
        rows, columns = format.cast_rows(a.detach(), Use("input", 1)), Operand(None, None)  # type: ignore[arg-type]
        if for_weight:
            columns = format.cast_columns(a.detach(), format.groups(offsets, a.shape[0]), Use("input", 0))
    if key is not None:
        remember(a, key, (rows, columns, offsets))  # which keeps the offsets alive, and so their id
    return rows, columns


def _check(a: Tensor, b: Tensor, offsets: Tensor) -> None:
    if a.ndim != 2 or b.ndim != 3 or a.shape[1] != b.shape[1] or offsets.shape != b.shape[:1]:
        raise ValueError(
            f"quantized_grouped_mm: a {tuple(a.shape)}, b {tuple(b.shape)}, offsets {tuple(offsets.shape)}; they must "
            "be [rows, k], [groups, k, m] and [groups]"
        )
    if a.dtype not in HIGH_PRECISION or b.dtype is not a.dtype:
        known = ", ".join(map(str, HIGH_PRECISION))
        raise ValueError(f"quantized_grouped_mm: a is {a.dtype} and b {b.dtype}; cast both to one of {known}")
    if offsets.dtype is not torch.int32:
        raise ValueError(f"quantized_grouped_mm: offsets are {offsets.dtype}; they must be int32: use offsets.int()")
    if not a.device == b.device == offsets.device:
        raise ValueError(
            f"quantized_grouped_mm: a is on {a.device}, b on {b.device}, offsets on {offsets.device}; move them to one "
            "device"
        )
    if a.device.type != "cpu" or torch.compiler.is_compiling() or isinstance(offsets, FakeTensor):
        return
    ends = [0, *offsets.tolist(), a.shape[0]]
    if ends != sorted(ends):
        raise ValueError(
            f"quantized_grouped_mm: offsets = {ends[1:-1]} for {a.shape[0]} rows; they are the ends of the groups, "
            "none less than the one before, and none more than the rows: use sizes.cumsum(0).int()"
        )


class _GroupedMatmul(torch.autograd.Function):
    """It saves the cast of ``a`` for grad_weight, a byte per element. To save ``b``, a parameter, costs nothing."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        offsets: Tensor,
        rows: Tensor,
        rows_scale: Tensor | None,
        columns: Tensor | None,
        columns_scale: Tensor | None,
        format: GroupedFormat,
    ) -> Tensor:
        ctx.format, ctx.dtype = format, a.dtype
        ctx.save_for_backward(b, offsets, columns, columns_scale)
        w = _cast_matrices(b.detach().transpose(1, 2), format)
        return format.multiply_rows(Operand(rows, rows_scale), w, offsets, "output", a.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        b, offsets, *saved = ctx.saved_tensors
        format: GroupedFormat = ctx.format
        if not torch.compiler.is_compiling():
            refuse_double_backward(format.name)
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            w = format.cast_transposed(b.detach().transpose(1, 2), WEIGHT_FOR_GRAD_INPUT)
            grad_a = format.multiply_rows(
                format.cast_rows(grad, Use("grad_output", 1)), w, offsets, "grad_input", ctx.dtype
            )
        if ctx.needs_input_grad[1]:
            groups = format.groups(offsets, grad.shape[0])
            g = format.cast_columns(grad, groups, Use("grad_output", 0))
            # As the weight of a linear layer, [groups, m, k]: so a parameter that b is a transpose of gets its layout.
            grad_b = format.multiply_columns(g, Operand(*saved), groups, b.dtype).transpose(1, 2)
        return grad_a, grad_b, *[None] * 6


def _cast_matrices(w: Tensor, format: GroupedFormat) -> Operand:
    """Cast each row of the weights ``w`` [groups, m, k]."""
    data, scale = format.cast_rows(w.reshape(-1, w.shape[2]), WEIGHT)
    return Operand(data.unflatten(0, w.shape[:2]), None if scale is None else scale.unflatten(0, w.shape[:2]))


class QuantGroupedMatmul(nn.Module):
    """A grouped matmul in a number format, to stand where a function ``(a, b, offsets)`` stood.

    Args:
        format: see :func:`quantized_grouped_mm`.
        plain: the function in high precision, for :func:`titanlite.quant.linear.high_precision`.

    Attributes:
        in_high_precision: compute ``plain``.
    """

    in_high_precision = False

    def __init__(self, format: GroupedFormat, plain: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.format, self.plain = format, plain

    def forward(self, a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
        if self.in_high_precision:
            return self.plain(a, b, offsets)
        return quantized_grouped_mm(a, b, offsets, self.format)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.format.describe().items())
