"""Looks at the loss and the gradient norm of every step without making the device wait."""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

_RANK_BITS = 20
_NONE_IS_LATER = 1 << 62


def rank_of_claim(claim: int) -> int:
    """The rank that made the winning :meth:`LossWatch.claim`."""
    return (_NONE_IS_LATER - claim) & ((1 << _RANK_BITS) - 1)


class _Pending(NamedTuple):
    step: int
    values: Tensor  # float32 [2]: loss, gradient norm
    arrived: torch.cuda.Event | None


class LossWatch:
    """Copies each step's values to the host beside the device's work, and looks at those that have arrived.

    At most ``depth`` steps are in flight: on a GPU a bad step is seen up to that many steps later, on the CPU at once.

    Attributes:
        bad: the first step whose values are not finite, as (step, loss, gradient norm).
        last_good: the last step before it.
    """

    def __init__(self, depth: int = 2) -> None:
        self._pending: deque[_Pending] = deque()
        self._depth = depth
        self.last_good: tuple[int, float, float] | None = None
        self.bad: tuple[int, float, float] | None = None

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        values = torch.stack((loss.detach().float(), grad_norm.detach().float()))
        if values.device.type == "cpu":
            self._pending.append(_Pending(step, values, None))
        else:
            host = torch.empty(2, dtype=torch.float32, pin_memory=True)
            host.copy_(values, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._pending.append(_Pending(step, host, event))
        self._look(self._depth)

    def drain(self) -> None:
        """Wait for all that is in flight."""
        self._look(0)

    def _look(self, in_flight: int) -> None:
        while self._pending:
            step, values, arrived = self._pending[0]
            if arrived is not None and not arrived.query():
                if len(self._pending) <= in_flight:
                    return
                arrived.synchronize()
            self._pending.popleft()
            loss, grad_norm = values.tolist()
            if self.bad is not None:
                continue
            if math.isfinite(loss) and math.isfinite(grad_norm):
                self.last_good = (step, loss, grad_norm)
            else:
                self.bad = (step, loss, grad_norm)

    def claim(self, rank: int) -> int:
        """0, or a number that is the larger the better this rank explains a failure: the earliest step, then a loss of
        its own that is not finite (a gradient norm is bad on all ranks at once), then the lowest rank."""
        if self.bad is None:
            return 0
        step, loss, _ = self.bad
        return _NONE_IS_LATER - ((step << (_RANK_BITS + 1)) + (math.isfinite(loss) << _RANK_BITS) + rank)

    def describe(self, rank: int) -> str:
        """The bad step in words, with the last good values."""
        if self.bad is None:
            return ""
        step, loss, grad_norm = self.bad
        last = "there was no good step before it"
        if self.last_good is not None:
            at, good_loss, good_norm = self.last_good
            last = f"the last good values were loss {good_loss:.4f}, grad_norm {good_norm:.4f} at step {at}"
        return (
            f"step {step}, rank {rank}: loss {loss}, grad_norm {grad_norm} is not finite; {last}. Lower optimizer.lr "
            "or training.max_norm, lengthen lr_scheduler.warmup_steps, or look at the data of that step"
        )
