"""One matmul for each group of rows: an operator around ``torch.nn.functional.grouped_mm``, for what that cannot serve.

torch's own serves a GPU, in bfloat16, with rows that begin at multiples of 16 bytes. Compiled, and on tensors without
data, it takes nothing else. On the CPU the loop below is the faster one.

For bfloat16 and float16 on the CPU, PyTorch calls oneDNN, which makes code for each new shape. That takes 0.6 ms,
and the product of 256 rows 0.1 ms. Groups have other sizes in every step, so their numbers of rows are rounded up.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """Return the products of groups; differentiable.

    Args:
        a: [rows, n]; the rows of a group lie one after the other.
        b: [groups, n, m], a matrix for each group.
        offsets: the end of each group in the rows, int32 [groups]. A group can be empty.

    Returns:
        [rows, m]. Each row of group i is multiplied by ``b[i]``. Rows after the last group are not defined.
    """
    if a.is_cuda and a.dtype is torch.bfloat16 and not a.shape[-1] % 8 and not b.shape[-1] % 8:
        return F.grouped_mm(a, b, offs=offsets)
    return _multiply(a, b, offsets)  # type: ignore[no-any-return]


def _bounds(offsets: Tensor) -> list[tuple[int, int]]:
    """Return where each group begins and ends. The host waits for a GPU here."""
    ends = offsets.tolist()
    return list(zip([0, *ends], ends))


def _rounded(rows: int, like: Tensor) -> int:
    """Return ``rows``, rounded up where new shapes are slow: to a multiple of 32, or by up to an eighth."""
    if like.device.type != "cpu" or like.dtype not in (torch.bfloat16, torch.float16):
        return rows
    unit = max(32, 1 << max(rows.bit_length() - 4, 0))
    return -(-rows // unit) * unit


class _Padded:
    """The rows of a group of ``x`` [rows, n] and rows of zeros after them, in one buffer for all groups."""

    def __init__(self, x: Tensor, bounds: list[tuple[int, int]]) -> None:
        self.x = x
        self.buffer = x.new_empty(max((_rounded(stop - start, x) for start, stop in bounds), default=0), x.shape[1])

    def __call__(self, start: int, stop: int) -> Tensor:
        count = stop - start
        rows = _rounded(count, self.x)
        if rows == count:
            return self.x[start:stop]
        self.buffer[:count] = self.x[start:stop]
        self.buffer[count:rows] = 0
        return self.buffer[:rows]


@torch.library.custom_op("titanlite::grouped_mm", mutates_args=())
def _multiply(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    out, bounds = a.new_empty(a.shape[0], b.shape[2]), _bounds(offsets)
    padded = _Padded(a, bounds)
    for matrix, (start, stop) in zip(b, bounds):
        end = start + _rounded(stop - start, a)
        if end <= a.shape[0]:  # the next groups write over the rows that are too many
            torch.mm(a[start:end], matrix, out=out[start:end])
        else:
            out[start:stop] = torch.mm(padded(start, stop), matrix)[: stop - start]
    return out


@_multiply.register_fake
def _(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[2])


@torch.library.custom_op("titanlite::grouped_mm_of_rows", mutates_args=())
def _multiply_rows(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    """Return ``grad_i.T @ a_i`` for the rows of each group, [groups, m, n]."""
    out = a.new_empty(offsets.shape[0], grad.shape[1], a.shape[1])
    bounds = _bounds(offsets)
    left, right = _Padded(grad, bounds), _Padded(a, bounds)
    for matrix, group in zip(out, bounds):
        torch.mm(left(*group).T, right(*group), out=matrix)  # zeros for an empty group
    return out


@_multiply_rows.register_fake
def _(grad: Tensor, a: Tensor, offsets: Tensor) -> Tensor:
    return a.new_empty(offsets.shape[0], grad.shape[1], a.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    a, b, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    grad_a = _multiply(grad, b.transpose(1, 2), offsets) if ctx.needs_input_grad[0] else None
    # The matrices are transposed weights in the one place that calls this: their gradients have the weights' layout.
    grad_b = _multiply_rows(grad, a, offsets).transpose(1, 2) if ctx.needs_input_grad[1] else None
    return grad_a, grad_b, None


_multiply.register_autograd(_backward, setup_context=_keep)

GROUPED_MATMULS = (torch.ops.aten._grouped_mm.default, torch.ops.titanlite.grouped_mm.default)
"""The operators behind the forward of :func:`grouped_mm`, for activation checkpointing."""
