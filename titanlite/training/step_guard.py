"""Keeps bad steps from the parameters: the verdict is made where the loss and the gradients are, so that nobody waits.

A step is bad if its loss or its gradient norm is not finite, or if its loss is a spike: more than
``training.spike_sigmas`` standard deviations above the mean of the last :data:`WINDOW` good losses. Gradient norms have
no such limit: theirs have heavy tails in healthy runs, and clipping bounds what they can do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanlite.config.schema import Training

WINDOW = 128

# The least that counts as a standard deviation, relative to the mean. Losses that hardly differ (of the same batch over
# and over) have one of rounding errors, which in bfloat16 are a tenth of this; healthy runs have tens of times more.
SMALLEST_DEVIATION = 1e-3


class StepRecord(NamedTuple):
    """One step, as the guard saw it.

    Attributes:
        own_loss: of this rank, 0 where the last pipeline stage is elsewhere.
        loss: the mean over all ranks.
        grad_norm: over all ranks, before clipping.
        mean, deviation: of the good losses in the window before this step, the latter at least
            :data:`SMALLEST_DEVIATION` times the former; NaN until the window is full.
        is_bad: the verdict.
        skipped: steps skipped so far.
        in_a_row: steps skipped since the last one that was not.
    """

    own_loss: float
    loss: float
    grad_norm: float
    mean: float
    deviation: float
    is_bad: bool
    skipped: int
    in_a_row: int

    @classmethod
    def of(cls, values: Tensor) -> StepRecord:
        """From what :meth:`StepGuard.step` returned, on the host."""
        own_loss, loss, grad_norm, mean, deviation, bad, skipped, in_a_row = values.tolist()
        return cls(own_loss, loss, grad_norm, mean, deviation, bool(bad), int(skipped), int(in_a_row))


class StepGuard:
    """Judges each step, and skips the update of a bad one where ``training.on_bad_step`` says so.

    What it judges by is the same on all ranks, so its verdicts and its state are too.

    Args:
        device: of the gradients.
    """

    def __init__(self, training: Training, device: torch.device) -> None:
        self._skips = training.on_bad_step == "skip"
        self._sigmas = training.spike_sigmas or math.inf
        # The latest loss last, NaN where there was none yet: until the window is full so are its mean and deviation,
        # and no loss is more than they.
        self._window = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # skipped, in a row

    def step(self, optimizer: torch.optim.Optimizer, own_loss: Tensor, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """``optimizer.step()``, unless the step is bad and to be skipped: then parameters and optimizer state keep
        every bit.

        Args:
            own_loss, loss, grad_norm: as of :class:`StepRecord`, scalars of any floating dtype.

        Returns:
            float64 [8] on the guard's device: the fields of :class:`StepRecord`.
        """
        if not self._skips:
            optimizer.step()
            return self.judge(own_loss, loss, grad_norm)
        record = self.judge(own_loss, loss, grad_norm)
        bad = record[StepRecord._fields.index("is_bad")]
        if _takes_verdict(optimizer):
            # The protocol of torch.amp.GradScaler: the kernels read on the device that they are to do nothing.
            optimizer.grad_scale, optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        elif not bad.item():
            optimizer.step()
        return record

    @torch.no_grad()
    def judge(self, own_loss: Tensor, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Take a step into account; arguments and result as of :meth:`step`."""
        values = torch.stack([x.detach().to(self._window) for x in (own_loss, loss, grad_norm)])
        loss = values[1]
        deviation, mean = torch.std_mean(self._window)
        deviation = torch.maximum(deviation, SMALLEST_DEVIATION * mean.abs())
        bad = ~values[1:].isfinite().all() | (loss > mean + self._sigmas * deviation)
        moved = torch.cat((self._window[1:], loss[None]))
        self._window = torch.where(bad, self._window, moved)
        if self._skips:
            self._counts = torch.stack((self._counts[0] + bad, (self._counts[1] + 1) * bad))
        return torch.cat((values, torch.stack((mean, deviation, bad.double())), self._counts))

    def state_dict(self) -> dict[str, Any]:
        """What the coming verdicts depend on, in numbers that JSON keeps exactly; waits for the device."""
        skipped, in_a_row = map(int, self._counts.tolist())
        losses = [loss for loss in self._window.tolist() if not math.isnan(loss)]
        return {"losses": losses, "skipped": skipped, "in_a_row": in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from where :meth:`state_dict` was taken."""
        losses: Sequence[float] = state["losses"]
        window = [math.nan] * (WINDOW - len(losses)) + [*losses]
        self._window.copy_(torch.tensor(window, dtype=torch.float64))
        self._counts.copy_(torch.tensor([state["skipped"], state["in_a_row"]], dtype=torch.float64))


def _takes_verdict(optimizer: torch.optim.Optimizer) -> bool:
    """Whether ``found_inf`` leaves every bit of an optimizer as it is. Of the fused ones Adam's and AdamW's does; SGD's
    leaves momentum that it has not initialized when the first step is skipped. Others have to be waited for."""
    return isinstance(optimizer, torch.optim.Adam) and getattr(optimizer, "_step_supports_amp_scaling", False)
