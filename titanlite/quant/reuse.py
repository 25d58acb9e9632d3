"""Reuse of casts: an input is cast once for all layers that take it, a weight once until it changes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

# ---- inputs

_memo: Any = WeakTensorKeyDictionary()  # input -> (its state, its copies by key)


def share_casts(x: Tensor) -> Tensor:
    """Let all quantized layers that take ``x`` share its casts, and return ``x``.

    Call it in the block that passes ``x`` to several layers. A write to ``x`` between them is noticed, unless it does
    not change the version counter of ``x``, as a write through ``.data``: do not write so to ``x`` after the call.

    Nothing is shared if ``x`` was not computed in a graph, as a batch or a receive buffer, which may be refilled. In
    compiled code there is nothing to do: the compiler merges equal computations.
    """
    if not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.grad_fn is not None:
        _memo[x] = (_state(x), {})
    return x


def share_first_input(block: nn.Module) -> None:
    """Let the layers of ``block`` share the casts of its first argument, as :func:`share_casts`."""
    block.register_forward_pre_hook(_share_first)


def _share_first(block: nn.Module, inputs: tuple[Any, ...]) -> None:
    if inputs:  # else the argument has a name, and nothing is shared
        share_casts(inputs[0])


def _state(x: Tensor) -> tuple[int, int]:
    """Return the version of ``x`` and the id of the running backward. The id keeps recomputation under activation
    checkpointing from using a copy of the forward: it must repeat all operations of the forward."""
    return x._version, torch._C._current_graph_task_id()


def _copies(x: Tensor) -> dict[Hashable, Any] | None:
    """Return the copies of ``x``, in its present state, that layers share; None if they share none."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return None
    state, copies = _memo.get(x, (None, None))
    if copies is not None and state != _state(x):
        copies = {}
        _memo[x] = (_state(x), copies)
    return copies  # type: ignore[no-any-return]


def remembered(x: Tensor, key: Hashable) -> Any:
    """Return what :func:`remember` stored for ``x`` under ``key``; None if nothing, or if ``x`` was written to."""
    copies = _copies(x)
    return None if copies is None else copies.get(key)


def remember(x: Tensor, key: Hashable, value: Any) -> None:
    """Store ``value`` under ``key`` for as long as ``x`` lives and is not written to, if layers share its casts."""
    copies = _copies(x)
    if copies is not None:
        copies[key] = value


# ---- weights

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """Return the number of steps of all ``torch.optim`` optimizers. Some write through ``.data``, which does not change
    the version counter of a weight."""
    return _optimizer_steps


class WeightCopies:
    """The quantized copies of a layer's weight, kept until the weight changes.

    A copy is kept only if it is used again, as by several microbatches, or was before the last change of the weight. A
    copy that only recomputation uses would take the memory that activation checkpointing saves.

    The weight has changed if it is another tensor, was written to (by its version counter) or has other memory, if an
    optimizer stepped, or if its gradient was cleared after a backward (a hand-written update may have come before).
    FSDP2 refills weights without changing the version counter, but it then assigns them to the layer, which calls
    :meth:`forget`. A copied or unpickled instance is empty.
    """

    def __init__(self) -> None:
        self.weight: weakref.ref[Tensor] | None = None
        self.storage: torch.UntypedStorage | None = None  # kept alive, so that its address is not reused
        self.state: tuple[int, ...] = ()
        self.copies: dict[Hashable, Any] = {}
        self.uses: Counter[Hashable] = Counter()  # since the weight changed
        self.used_again: dict[Hashable, bool] = {}  # before the weight changed
        self.backward_ran = False

    def forget(self) -> None:
        """Drop the copies, but remember which were used again."""
        self.used_again |= {key: count > 1 for key, count in self.uses.items()}
        self.uses.clear()
        self.copies.clear()
        self.weight, self.storage, self.backward_ran = None, None, False

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Any], *, in_forward: bool) -> Any:
        """Return the copy of ``weight`` under ``key``; ``make`` creates it if there is none.

        Args:
            in_forward: True if called in forward. In backward, a missing gradient does not mean that it was cleared.
        """
        self._refresh(weight, in_forward)
        self.uses[key] += not (in_forward and torch._C._current_graph_task_id() != -1)  # recomputation does not count
        if key in self.copies:
            return self.copies[key]
        # Without dispatch modes: selective checkpointing replays the operations of a forward in order, and these
        # operations run only if there is no copy.
        with torch.no_grad(), _disable_current_modes():
            copy = make()
        if self.uses[key] > 1 or self.used_again.get(key):
            self.copies[key] = copy
        return copy

    def has(self, weight: Tensor, key: Hashable, *, in_forward: bool) -> bool:
        """Return whether :meth:`get` would return a copy without a call of ``make``."""
        self._refresh(weight, in_forward)
        return key in self.copies

    def _refresh(self, weight: Tensor, in_forward: bool) -> None:
        """Drop the copies if the weight has changed."""
        # A DTensor and its local tensor each count only the writes through themselves.
        local = weight._local_tensor if isinstance(weight, DTensor) else weight
        storage = local.untyped_storage()
        state = (weight._version, local._version, storage._cdata, _optimizer_steps)
        grad_cleared = in_forward and self.backward_ran and weight.requires_grad and weight.grad is None
        if self.weight is None or self.weight() is not weight or state != self.state or grad_cleared:
            self.forget()
            self.weight, self.storage, self.state = weakref.ref(weight), storage, state
