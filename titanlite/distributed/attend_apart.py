"""Attention of each document alone as one operator, for compiled code on the CPU.

The compiler cannot trace lengths that change from step to step. It does not look into an operator.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from titanlite.models.layers import causal_attention, document_mask
from titanlite.models.layers.attention import visible

_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def attend_in_operator(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: Tensor | None = None
) -> Tensor:
    """Compute :func:`~titanlite.models.layers.causal_attention` of each document alone.

    Args:
        documents: the position at which the document of each token begins, int64 [batch, seq_len].
    """
    if documents is None:
        return causal_attention(q, k, v, window)
    if v.shape[-1] != q.shape[-1]:  # the kernel does not take it
        return causal_attention(q, k, v, window, document_mask(documents, window))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    out: Tensor = _attend(q, k, v, documents, window or 0)[0]
    return out


def _documents(starts: Tensor) -> Iterator[tuple[slice, slice, slice]]:
    """Return where each document is in tensors [batch, heads, seq_len, ...]."""
    for row, begins in enumerate(starts):
        borders = [*begins.unique().tolist(), begins.shape[0]]
        for begin, end in itertools.pairwise(borders):
            yield slice(row, row + 1), slice(None), slice(begin, end)


def _seen(q: Tensor, window: int) -> tuple[bool, Tensor | None]:
    """Return whether a document is plainly causal, and otherwise what is added to its scores."""
    length = q.shape[2]
    if not 0 < window < length:
        return True, None
    seen = visible(length, length, window, q.device)
    return False, q.new_zeros(length, length).masked_fill(~seen, -torch.inf)


def _empty_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return memory for the output, of which the features of a token's heads lie side by side, and for the log-sum-exp
    of the scores, [batch, heads, seq_len]."""
    batch, heads, seq_len, head_dim = q.shape
    out = q.new_empty(batch, seq_len, heads, head_dim).transpose(1, 2)
    precise = torch.promote_types(q.dtype, torch.float32)
    return out, q.new_empty(batch, heads, seq_len, dtype=precise)


@torch.library.custom_op("titanlite::attend_apart", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    out, lse = _empty_like(q)
    for part in _documents(starts):
        causal, mask = _seen(q[part], window)
        out[part], lse[part] = _FLASH(q[part], k[part], v[part], 0.0, causal, attn_mask=mask)
    return out, lse


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, window: int) -> tuple[Tensor, Tensor]:
    return _empty_like(q)


@torch.library.custom_op("titanlite::attend_apart_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    grads = tuple(_empty_like(x)[0] for x in (q, k, v))
    for part in _documents(starts):
        causal, mask = _seen(q[part], window)
        given = (x[part] for x in (grad, q, k, v, out, lse))
        for whole, of_part in zip(grads, _FLASH_BACKWARD(*given, 0.0, causal, attn_mask=mask), strict=True):
            whole[part] = of_part
    return grads  # type: ignore[return-value]


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_like(q)[0], _empty_like(k)[0], _empty_like(v)[0]


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, int], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, starts = ctx.saved_tensors
    return *_attend_backward(grad, q, k, v, out, lse, starts, ctx.window), None, None


_attend.register_autograd(_backward, setup_context=_keep)

ATTEND_APART = torch.ops.titanlite.attend_apart.default
"""The operator, for activation checkpointing."""
