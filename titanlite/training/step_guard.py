"""Keep bad steps from changing the parameters. The device itself judges each step, so that the host need not wait.

A step is bad if its loss or its gradient norm is not finite, or if its loss is a spike: more than
``training.spike_sigmas`` standard deviations above the mean of the last :data:`WINDOW` good losses. Gradient norms
have no such limit: in healthy runs they have heavy tails, and clipping bounds their effect.

A step is bad, too, if none of its labels is scored. It is always skipped: an optimizer would move the parameters by its
momentum and its weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titanlite.config.schema import Training
from titanlite.optim import update_parameters

WINDOW = 128

# The lower bound of the standard deviation, relative to the mean. Without it, losses that hardly differ (the same batch
# again and again) would be judged by rounding errors. In bfloat16 these are a tenth of the bound; the deviation of
# healthy runs is tens of times the bound.
SMALLEST_DEVIATION = 1e-3


class StepRecord(NamedTuple):
    """The guard's record of one step.

    Attributes:
        local_loss: the loss of this rank; 0 on a rank without the last pipeline stage.
        loss: the mean loss over all ranks.
        grad_norm: the gradient norm over all ranks, before clipping.
        mean, deviation: mean and standard deviation of the good losses in the window before this step; the deviation is
            at least :data:`SMALLEST_DEVIATION` times the mean. NaN until the window is full.
        is_bad: True if the step is bad.
        skipped: the number of steps skipped so far.
        in_a_row: the number of steps skipped since the last step that was not.
        stops: the number of ranks that had been asked to stop.
        scored: the number of scored labels of all ranks.
    """

    local_loss: float
    loss: float
    grad_norm: float
    mean: float
    deviation: float
    is_bad: bool
    skipped: int
    in_a_row: int
    stops: int
    scored: int

    @classmethod
    def of(cls, values: Tensor) -> StepRecord:
        """Make a record from the result of :meth:`StepGuard.step`; waits if that is on a device."""
        local_loss, loss, grad_norm, mean, deviation, bad, *counts = values.tolist()
        return cls(local_loss, loss, grad_norm, mean, deviation, bool(bad), *map(int, counts))


IS_BAD = StepRecord._fields.index("is_bad")
_SCORED = StepRecord._fields.index("scored")


class StepGuard:
    """Judges each step, and skips the update of a bad one where ``training.on_bad_step`` says so.

    Its verdicts and its state are the same on all ranks, because all inputs that it judges by are.

    Args:
        device: the device of the gradients.
    """

    def __init__(self, training: Training, device: torch.device) -> None:
        self._skips = training.on_bad_step == "skip"
        self._sigmas = training.spike_sigmas or math.inf
        # The latest loss is last; missing ones are NaN. Until the window is full, mean and deviation are NaN too, and
        # no loss is greater than NaN.
        self._window = torch.full((WINDOW,), math.nan, dtype=torch.float64, device=device)
        self._counts = torch.zeros(2, dtype=torch.float64, device=device)  # skipped, in a row

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        local_loss: Tensor,
        loss: Tensor,
        grad_norm: Tensor,
        divisor: Tensor,
        stops: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Update the parameters, unless the step is bad and must be skipped. A skipped step changes no bit of the
        parameters and of the optimizer state.

        Args:
            local_loss, loss, grad_norm, stops, scored: see :class:`StepRecord`; scalars of any floating dtype. None: no
                rank was asked to stop, and some label is scored, as always in texts.
            divisor: what the gradients are divided by; see :func:`titanlite.optim.update_parameters`.

        Returns:
            float64 [10] on the guard's device: the fields of :class:`StepRecord`.
        """
        record = self.judge(local_loss, loss, grad_norm, stops, scored)
        skip = record[IS_BAD] if self._skips else None if scored is None else record[_SCORED] == 0
        update_parameters(optimizer, divisor, skip)
        return record

    @torch.no_grad()
    def judge(
        self,
        local_loss: Tensor,
        loss: Tensor,
        grad_norm: Tensor,
        stops: Tensor | None = None,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Judge a step, without an optimizer; arguments and result are those of :meth:`step`."""
        values = torch.stack([x.detach().to(self._window) for x in (local_loss, loss, grad_norm)])
        loss = values[1]
        deviation, mean = torch.std_mean(self._window)
        deviation = torch.maximum(deviation, SMALLEST_DEVIATION * mean.abs())
        scored = torch.ones_like(loss) if scored is None else scored.to(loss)
        empty = scored == 0
        bad = ~values[1:].isfinite().all() | (loss > mean + self._sigmas * deviation) | empty
        moved = torch.cat((self._window[1:], loss[None]))
        self._window = torch.where(bad, self._window, moved)
        skip = bad if self._skips else empty
        self._counts = torch.stack((self._counts[0] + skip, (self._counts[1] + 1) * skip))
        stops = torch.zeros_like(loss) if stops is None else stops.to(loss)
        verdict = torch.stack((mean, deviation, bad.double()))
        return torch.cat((values, verdict, self._counts, torch.stack((stops, scored))))

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the guard, in numbers that JSON keeps exactly; waits for the device."""
        skipped, in_a_row = map(int, self._counts.tolist())
        losses = [loss for loss in self._window.tolist() if not math.isnan(loss)]
        return {"losses": losses, "skipped": skipped, "in_a_row": in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state_dict` returned."""
        losses: Sequence[float] = state["losses"]
        window = [math.nan] * (WINDOW - len(losses)) + [*losses]
        self._window.copy_(torch.tensor(window, dtype=torch.float64))
        self._counts.copy_(torch.tensor([state["skipped"], state["in_a_row"]], dtype=torch.float64))
