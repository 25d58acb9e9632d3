"""Attention in sequences that hold several documents: no token attends to another document.

Four ways compute the same: a mask of all pairs of positions (:func:`~titanlite.models.layers.document_mask`), the
model's own; each document alone, for the CPU; the same within an operator, for the CPU with the compiler;
FlexAttention with a mask of blocks, for GPUs. Each is a pair of functions for the slots ``Decoder.mask_of`` and
``AttentionSlot.core``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from titanlite.distributed.attend_apart import attend_in_operator
from titanlite.models.layers import Core, causal_attention

BLOCK = 128  # positions; FlexAttention's default


class DocumentAttention(NamedTuple):
    """A way to compute attention within documents.

    Attributes:
        mask_of: (starts, window) -> documents, once for all blocks.
        core: (q, k, v, window, documents) -> out; causal attention where ``documents`` is None.
    """

    mask_of: Callable[[Tensor, int | None], Any]
    core: Core


def document_attention(device_type: str, compiling: bool) -> DocumentAttention:
    """Return the way for a device. On the CPU, documents apart cost no pair of positions in two documents."""
    if device_type == "cuda":
        return DocumentAttention(block_mask, attend_in_blocks)
    if compiling:
        return DocumentAttention(lambda starts, window: starts, attend_in_operator)
    return DocumentAttention(lengths, attend_apart)


def lengths(starts: Tensor, window: int | None = None) -> list[list[int]]:
    """Return the lengths of the documents of each sequence, given ``starts`` [batch, seq_len]."""
    seq_len = starts.shape[1]
    begins = [torch.cat((row.unique(), row.new_tensor([seq_len]))) for row in starts]
    return [begin.diff().tolist() for begin in begins]


def attend_apart(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: list[list[int]] | None = None
) -> Tensor:
    """Compute :func:`causal_attention` of each document alone; ``documents`` are :func:`lengths`."""
    if documents is None or all(len(row) == 1 for row in documents):
        return causal_attention(q, k, v, window)
    sequences = zip(*(x.split(1) for x in (q, k, v)), documents, strict=True)
    parts = [
        causal_attention(*document, window=window)  # type: ignore[misc]
        for *qkv, sizes in sequences
        for document in zip(*(x.split(sizes, 2) for x in qkv), strict=True)
    ]
    out = torch.cat(parts, 2)  # [1, heads, batch * seq_len, head_dim]
    return out.unflatten(2, (len(documents), -1)).squeeze(0).transpose(0, 1)


def block_mask(starts: Tensor, window: int | None = None) -> BlockMask:
    """Return which blocks of 128 keys each block of 128 queries computes, and which of these need no mask inside.

    It is built from the ends of the blocks, not from all pairs of positions, because documents are contiguous: the
    first key that a query sees never decreases from query to query.

    Args:
        starts: the position at which the document of each token begins, int64 [batch, seq_len].
        window: the number of positions that a query sees; None: all of its document.
    """
    seq_len = starts.shape[1]
    last = torch.arange(seq_len, device=starts.device)
    first = starts if window is None else torch.maximum(starts, last - window + 1)  # the first key of each query

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[batch, query])

    begins = last[::BLOCK]
    ends = (begins + BLOCK - 1).clamp(max=seq_len - 1)
    lowest, highest = first[:, begins, None], first[:, ends, None]  # [batch, blocks of queries, 1]
    computed = (ends >= lowest) & (begins <= ends[:, None])
    complete = (begins + BLOCK <= seq_len)[:, None]  # the last block of queries may be shorter
    whole = (begins >= highest) & (ends < begins[:, None]) & computed & complete
    partial = computed & ~whole
    (count, indices), (whole_count, whole_indices) = _listed(partial), _listed(whole)
    return BlockMask.from_kv_blocks(
        count, indices, whole_count, whole_indices, BLOCK, mask_mod=sees, seq_lengths=(seq_len, seq_len)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks of keys of each block of queries, int32 [batch, 1, blocks], and their indices, first
    in each row of [batch, 1, blocks, blocks]; ``blocks`` is bool [batch, blocks, blocks]."""
    chosen = blocks.unsqueeze(1).to(torch.int32)
    indices = chosen.argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32), indices.to(torch.int32)


def attend_in_blocks(
    q: Tensor, k: Tensor, v: Tensor, window: int | None = None, documents: BlockMask | None = None
) -> Tensor:
    """Compute attention with FlexAttention; ``documents`` is :func:`block_mask` with the same window."""
    if documents is None:
        return causal_attention(q, k, v, window)
    out: Tensor = _compiled_flex()(q, k, v, block_mask=documents, enable_gqa=q.shape[1] != k.shape[1])
    return out


@cache
def _compiled_flex() -> Callable[..., Any]:
    # Without the compiler it would compute, and keep, the scores of all pairs.
    return torch.compile(flex_attention, dynamic=False)
