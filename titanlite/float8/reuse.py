"""What is quantized once and used again: an input by all layers that take it, a weight until it changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _disable_current_modes

_COPIES = "_float8_copies"


def remembered(x: Tensor, key: Hashable) -> Any:
    """What :func:`remember` stored for this very tensor under ``key``, unless it was written to since; else None."""
    if torch.compiler.is_compiling() or x.is_inference():
        return None
    version, copies = _known(x)
    return copies.get(key) if version == x._version else None


def remember(x: Tensor, key: Hashable, copies: Any) -> None:
    """Keep ``copies`` with ``x``, for as long as ``x`` lives and keeps its values.

    Not in compiled code, where equal computations are merged anyway.
    """
    if torch.compiler.is_compiling() or x.is_inference():
        return
    version, known = _known(x)
    setattr(x, _COPIES, (x._version, {**(known if version == x._version else {}), key: copies}))


def _known(x: Tensor) -> tuple[int | None, dict[Hashable, Any]]:
    known: tuple[int | None, dict[Hashable, Any]] = getattr(x, _COPIES, (None, {}))
    return known


_optimizer_steps = 0


def _count_step(*_: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


class WeightCopies:
    """The quantized copies of a layer's weight, until the weight changes.

    It counts as changed when it was written to (its version counter) or given other memory, when any ``torch.optim``
    optimizer stepped (some write through ``.data``, which no counter sees), and when its gradient was thrown away after
    a backward (a hand-written update may have come between). Another tensor in its place, which is also FSDP2's way to
    fill it again behind the version counter's back, is seen by the layer, which then begins anew.
    """

    def __init__(self) -> None:
        self.state: tuple[int, ...] | None = None
        self.copies: dict[Hashable, Any] = {}
        self.backward_ran = False

    def get(self, weight: Tensor, key: Hashable, make: Callable[[], Any], *, in_forward: bool) -> Any:
        """The copy under ``key``, which ``make`` makes if there is none.

        Args:
            in_forward: or in backward, where a gradient is not there yet, rather than thrown away.
        """
        # A DTensor and its local tensor, each written to by other people, count their own writes.
        local = weight._local_tensor if isinstance(weight, DTensor) else weight
        state = (weight._version, local._version, local.untyped_storage()._cdata, _optimizer_steps)
        if state != self.state or (in_forward and self.backward_ran and weight.grad is None):
            self.copies.clear()
            self.state, self.backward_ran = state, False
        if key not in self.copies:
            # Hidden from dispatch modes: selective checkpointing replays the operations of a forward in order, and
            # these come only when there is no copy yet.
            with torch.no_grad(), _disable_current_modes():
                self.copies[key] = make()
        return self.copies[key]


register_optimizer_step_post_hook(_count_step)
