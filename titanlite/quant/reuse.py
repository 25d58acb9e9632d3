"""What is quantized once and used again: an input by all layers that take it, a weight until it changes."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

# ---- inputs

_memo: Any = WeakTensorKeyDictionary()  # input -> (its version, what was made of it)


def _is_result(x: Tensor) -> bool:
    """Whether ``x`` was computed in a graph. What was not, such as a batch or a receive buffer, is often filled again
    where no version counter sees it; in compiled code equal computations are merged anyway."""
    return not torch.compiler.is_compiling() and torch.is_grad_enabled() and x.grad_fn is not None


def _moment(x: Tensor) -> tuple[int, int]:
    """The state of ``x``, and the backward that runs, if any: recomputation under activation checkpointing has to
    repeat the operations of the forward, one for one."""
    return x._version, torch._C._current_graph_task_id()


def remembered(x: Tensor, key: Hashable) -> Any:
    """What :func:`remember` stored for this very tensor under ``key``, unless it was written to since; else None."""
    if not _is_result(x):
        return None
    moment, copies = _memo.get(x, (None, {}))
    return copies.get(key) if moment == _moment(x) else None


def remember(x: Tensor, key: Hashable, copies: Any) -> None:
    """Keep ``copies`` with ``x``, for as long as ``x`` lives and keeps its values."""
    if _is_result(x):
        moment, known = _memo.get(x, (None, {}))
        _memo[x] = (_moment(x), {**(known if moment == _moment(x) else {}), key: copies})


# ---- weights

_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


register_optimizer_step_post_hook(_count_step)


def optimizer_steps() -> int:
    """How often any ``torch.optim`` optimizer stepped: some write through ``.data``, which no version counter sees."""
    return _optimizer_steps


class WeightCopies:
    """The quantized copies of a layer's weight, until the weight changes: of those that several microbatches use, as
    they did the time before. A copy for recomputation alone would take the memory that checkpointing is to save.

    It counts as changed when it is another tensor, was written to (its version counter) or given other memory, when an
    optimizer stepped, and when its gradient was thrown away after a backward (a hand-written update may have come
    between). FSDP2 fills its weights again behind the version counter's back, but assigns them to the layer when it
    does, which then begins anew.

    Copied with its layer, or pickled, it begins anew.
    """

    def __init__(self) -> None:
        self.weight: weakref.ref[Tensor] | None = None
        self.storage: torch.UntypedStorage | None = None  # held, so that its address is not given to another
        self.state: tuple[int, ...] = ()
        self.copies: dict[Hashable, Any] = {}
        self.uses: Counter[Hashable] = Counter()  # of this state of the weight
        self.used_again: dict[Hashable, bool] = {}  # in its last state
        self.backward_ran = False

    def __reduce__(self) -> tuple[type[WeightCopies], tuple[()]]:
        return WeightCopies, ()

    def forget(self) -> None:
        """Drop the copies, not what is known of their use."""
        self.used_again |= {key: count > 1 for key, count in self.uses.items()}
        self.uses.clear()
        self.copies.clear()
        self.weight, self.storage, self.backward_ran = None, None, False

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Any], *, in_forward: bool) -> Any:
        """The copy of ``weight`` under ``key``, which ``make`` makes if there is none.

        Args:
            in_forward: or in backward, where a gradient is not there yet, rather than thrown away.
        """
        # A DTensor and its local tensor, each written to by other people, count their own writes.
        local = weight._local_tensor if isinstance(weight, DTensor) else weight
        storage = local.untyped_storage()
        state = (weight._version, local._version, storage._cdata, _optimizer_steps)
        thrown_away = in_forward and self.backward_ran and weight.requires_grad and weight.grad is None
        if self.weight is None or self.weight() is not weight or state != self.state or thrown_away:
            self.forget()
            self.weight, self.storage, self.state = weakref.ref(weight), storage, state
        self.uses[key] += not (in_forward and torch._C._current_graph_task_id() != -1)  # else it is recomputed
        if key in self.copies:
            return self.copies[key]
        # Hidden from dispatch modes: selective checkpointing replays the operations of a forward in order, and these
        # come only when there is no copy yet.
        with torch.no_grad(), _disable_current_modes():
            made = make()
        if self.uses[key] > 1 or self.used_again.get(key):
            self.copies[key] = made
        return made
