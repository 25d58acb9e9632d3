"""A cache of keys and values, so that each new token is computed alone.

A model family works without changes if its ``forward(tokens, positions)`` takes the positions of the tokens, and its
attention modules are :class:`~titanlite.models.layers.AttentionSlot`. What their slot is given: q [batch, heads,
seq_len, head_dim], k and v [batch, kv_heads, seq_len, head_dim]; positions are already applied to q and k, and
attention is causal over the whole sequence, or over a sliding window of it. Of latent attention the latents are cached
in place of keys and values.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import TracebackType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titanlite.errors import ConfigError, counted
from titanlite.models.layers import AttentionSlot, Core, LatentAttention, visible

_FIRST_ROOM = 256  # tokens; more is allocated when they come


def forward(
    model: nn.Module,
    tokens: Tensor,
    start: int | Sequence[int] = 0,
    multiple: int = 1,
    lengths: Sequence[int] | None = None,
) -> Tensor:
    """Return the logits [batch, n, vocab] of ``tokens`` [batch, n].

    Args:
        start: the position of the first token, of all rows or of each.
        multiple: pad the sequence to a multiple of this, because sequence parallelism divides it. The padding is copies
            of the last token at the same position. They add no new activation values, so the scales of quantized
            layers do not change.
        lengths: the number of tokens of each row; the rest is padding, which gets the position of the last token. None:
            n.
    """
    n = tokens.shape[1]
    positions = torch.arange(n, device=tokens.device)
    if isinstance(start, int):
        positions = positions + start
    else:  # [batch, n]
        last = torch.tensor([max(1, length) - 1 for length in lengths or [n] * len(start)], device=tokens.device)
        positions = positions.minimum(last[:, None]) + torch.tensor(start, device=tokens.device)[:, None]
    if missing := -n % multiple:
        tokens = torch.cat((tokens, tokens[:, -1:].expand(-1, missing)), 1)
        positions = torch.cat((positions, positions[..., -1:].expand(*positions.shape[:-1], missing)), -1)
    logits: Tensor = model(tokens, positions)
    return logits[:, :n]


class KVCache:
    """A cache of the keys and values of all tokens so far, for every attention of ``model``. Inside the context, it
    fills the slot ``core`` of these modules::

        with KVCache(model, capacity=100) as cache:
            logits = cache(prompt)  # [batch, n, vocab]
            logits = cache(next_token)  # [batch, 1, vocab]

    Memory is allocated as it is needed.

    Args:
        capacity: the largest number of tokens of a row, with its padding.
        multiple: as in :func:`forward`; the cache does not keep the padding.

    Attributes:
        lengths: the number of tokens so far, of each row; empty before the first call.

    Raises:
        ConfigError: the model has no attention with a slot, or, in a call, the capacity is exceeded.
    """

    def __init__(self, model: nn.Module, capacity: int, multiple: int = 1) -> None:
        self.model, self.capacity, self.multiple = model, capacity, multiple
        self.lengths: list[int] = []
        self._new = 0
        self._modules = [module for module in model.modules() if isinstance(module, AttentionSlot)]
        self._cores = [module.core for module in self._modules]
        self._kept: dict[nn.Module, tuple[Tensor, ...]] = {}
        if not self._modules:
            raise ConfigError(
                f"{type(model).__name__} has no AttentionSlot for a cache of keys and values; give its attention one, "
                "or generate without the cache"
            )

    @property
    def length(self) -> int:
        """The number of tokens so far, of the longest row."""
        return max(self.lengths, default=0)

    def __enter__(self) -> KVCache:
        for module, core in zip(self._modules, self._cores, strict=True):
            module.core = partial(self._attend, module, core)
            if isinstance(module, LatentAttention):
                module.latents = partial(self._all_latents, module)
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        for module, core in zip(self._modules, self._cores, strict=True):
            module.core = core
            if isinstance(module, LatentAttention):
                module.latents = None
        self._kept.clear()

    def truncate(self, length: int) -> None:
        """Forget the tokens of each row after the first ``length``."""
        self.lengths = [min(length, row) for row in self.lengths]

    @torch.no_grad()
    def __call__(self, tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
        """Return the logits [batch, n, vocab] of the next tokens [batch, n], and cache their keys and values.

        Args:
            lengths: the number of new tokens of each row, which can be 0; the rest is padding, whose logits mean
                nothing. None: n.
        """
        batch, new = tokens.shape
        starts = self.lengths or [0] * batch
        if self.length + new > self.capacity:
            raise ConfigError(
                f"the cache of keys and values has room for {counted(self.capacity, 'token')}, and {self.length} + "
                f"{new} are to go into it; make it larger"
            )
        self.lengths, self._new = starts, new
        same = len({*starts}) == 1 and (lengths is None or all(length == new for length in lengths))
        logits = forward(self.model, tokens, starts[0] if same else starts, self.multiple, lengths)
        self.lengths = [start + length for start, length in zip(starts, lengths or [new] * batch, strict=True)]
        return logits

    def _attend(
        self,
        module: nn.Module,
        causal: Core,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        window: int | None = None,
        documents: None = None,
    ) -> Tensor:
        starts, new = self.lengths, self._new
        padding = q.shape[2] - new
        q = q[:, :, :new]
        if isinstance(module, LatentAttention):  # all keys are made of the latents, which are cached
            keys, values = k, v
        else:
            k, v = k[:, :, :new], v[:, :, :new]
            keys, values = self._append(module, k, v)
        if not any(starts):
            out = causal(q, k, v, window)  # as in training; kernels without a mask need less memory
        else:
            first = 0
            if window is not None:  # the first of the new tokens of the shortest row sees as many positions
                first = max(0, min(starts) + 1 - window)
                keys, values = keys[:, :, first:], values[:, :, first:]
            mask = None  # a single token sees all that is left
            if len({*starts}) > 1:
                mask = self._visible(first, keys.shape[2], window, q.device)
            elif new > 1:
                mask = visible(new, keys.shape[2], window, q.device)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
        return torch.cat((out, out[:, :, -1:].expand(-1, -1, padding, -1)), 2) if padding else out

    def _all_latents(self, module: nn.Module, latents: Tensor) -> Tensor:
        return self._append(module, latents[:, :, : self._new])[0]

    def _append(self, module: nn.Module, *added: Tensor) -> tuple[Tensor, ...]:
        """Append tensors [batch, heads, n, features] to those in the cache of ``module``; return all so far. What lies
        after the tokens of a row is overwritten by its next ones."""
        starts, new, end = self.lengths, self._new, self.length + self._new
        kept = self._kept.get(module)
        if kept is None or kept[0].shape[2] < end:
            before = 0 if kept is None else kept[0].shape[2]
            room = min(self.capacity, max(_FIRST_ROOM, end, 2 * before))
            larger = tuple(x.new_zeros((*x.shape[:2], room, x.shape[3])) for x in added)
            if kept is not None:
                for to, of in zip(larger, kept):
                    to[:, :, :before] = of
            kept = self._kept[module] = larger
        so_far = tuple(each[:, :, :end] for each in kept)
        if len({*starts}) == 1:
            for to, x in zip(so_far, added, strict=True):
                to[:, :, end - new :] = x
        else:
            device = added[0].device
            rows, columns = torch.arange(len(starts), device=device)[:, None], self._positions(device)
            for to, x in zip(so_far, added, strict=True):
                to[rows, :, columns] = x.transpose(1, 2)
        return so_far

    def _positions(self, device: torch.device) -> Tensor:
        """Return the positions of the new tokens in each row, int64 [batch, n]."""
        return torch.tensor(self.lengths, device=device)[:, None] + torch.arange(self._new, device=device)

    def _visible(self, first: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Return which keys each query sees, bool [batch, 1, n, keys], where the first key has the position ``first``
        and rows have different lengths."""
        queries = self._positions(device)[:, :, None]
        column = torch.arange(first, first + keys, device=device)
        seen = column <= queries
        return (seen if window is None else seen & (column > queries - window)).unsqueeze(1)
