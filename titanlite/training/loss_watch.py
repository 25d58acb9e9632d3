"""Check the loss and the gradient norm of every step, without making the device wait, and describe bad steps."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from titanlite.config.schema import Training
from titanlite.errors import counted
from titanlite.training.step_guard import WINDOW, StepRecord

logger = logging.getLogger()

_RANK_BITS = 20
_IN_A_ROW = 5  # losses, at the start and when it is judged: one can be of a hard batch
_NONE_IS_LATER = 1 << 62


def rank_of_claim(claim: int) -> int:
    """Return the rank that made the largest :meth:`LossWatch.claim`."""
    return (_NONE_IS_LATER - claim) & ((1 << _RANK_BITS) - 1)


class Arrival(Protocol):
    """The part of ``torch.cuda.Event`` that is used."""

    def query(self) -> bool: ...
    def synchronize(self) -> None: ...


class _Pending(NamedTuple):
    step: int
    values: Tensor  # the fields of StepRecord
    arrived: Arrival | None


class LossWatch:
    """Copies each step's record to the host while the device works, and checks the records that have arrived.

    At most ``depth`` steps are in flight. On a GPU a bad step, and a request to stop, is seen up to ``depth`` steps
    later, on the CPU at once. Rank 0 logs a warning for each skipped step, until ``training.max_skipped_in_a_row`` is
    reached.

    Attributes:
        latest: the latest record that was checked.
        bad: the number and record of the first step that must end the run.
        last_good: the number and record of the last good step before it.
        losses: the finite losses of the latest steps, the last one last.

    Args:
        losses: those of the steps before, of a run that continues.
        start: the loss of step 1, of a run that continues; with the ``losses``, what its losses are held against.
        uniform: the loss of a model that finds all tokens equally likely, the logarithm of their number.
    """

    def __init__(
        self,
        training: Training,
        rank: int,
        losses: Sequence[float] = (),
        depth: int = 2,
        *,
        start: float | None = None,
        uniform: float = math.inf,
    ) -> None:
        self._training, self._rank, self._depth = training, rank, depth
        self._calls: int | None = None  # the first step after which the run may end
        self._delay = 0
        self._uniform = uniform
        self._start = 0.0 if start is None else max([start, *losses])  # the highest of the first losses
        if losses and min(losses) <= uniform:
            self._start = min(self._start, uniform)
        self._first_losses = 0 if start is None else _IN_A_ROW  # how many of them were seen
        self._high = 0  # losses in a row above that
        self._warned = False
        self._pending: deque[_Pending] = deque()
        self.losses = deque(losses, maxlen=WINDOW)
        self.latest: StepRecord | None = None
        self.last_good: tuple[int, StepRecord] | None = None
        self.bad: tuple[int, StepRecord] | None = None

    def add(self, step: int, record: Tensor) -> None:
        """Watch a step; ``record`` is the result of :meth:`StepGuard.step`."""
        if record.device.type == "cpu":
            self._pending.append(_Pending(step, record, None))
            self._look(self._depth)
        else:
            host = torch.empty(record.shape, dtype=record.dtype, pin_memory=True)
            host.copy_(record, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self.add_arriving(step, host, event)

    def add_arriving(self, step: int, values: Tensor, arrived: Arrival) -> None:
        """Watch a step whose record, ``values``, is complete on the host once ``arrived`` is."""
        self._pending.append(_Pending(step, values, arrived))
        self._delay = self._depth
        self._look(self._depth)

    def drain(self) -> None:
        """Wait for all steps in flight, and check them."""
        self._look(0)

    def calls(self, step: int) -> bool:
        """Return True if the ranks must agree after ``step``: some rank was asked to stop, or a step was bad, on a GPU
        ``depth`` steps ago. The answer is the same on all ranks, whatever has arrived on each, and needs no message: it
        is read from what the all-reduce of the gradients' norm brought."""
        return self._calls is not None and self._calls + self._delay <= step

    def _look(self, in_flight: int) -> None:
        while self._pending:
            step, values, arrived = self._pending[0]
            if arrived is not None and not arrived.query():
                if len(self._pending) <= in_flight:
                    return
                arrived.synchronize()
            self._pending.popleft()
            self.latest = StepRecord.of(values)
            if math.isfinite(self.latest.loss) and self.latest.scored:
                self.losses.append(self.latest.loss)
                self._look_for_divergence(step, self.latest.loss)
            if self.bad is None:
                self._see(step, self.latest)
            if self._calls is None and (self.latest.stops or self.bad is not None):
                self._calls = step

    def _look_for_divergence(self, step: int, loss: float) -> None:
        """Warn if the loss rises above where it began. From step 2 on a rise by a fifth counts, if the loss is above
        that of guessing too; so do five losses in a row that are a tenth above the highest of the first five. Warn
        again only after it has come back."""
        if not self._first_losses:
            self._compare_with_guessing(step, loss)
        if self._start > self._uniform >= loss:  # it began above guessing, and has learned since
            self._start = self._uniform
        high = loss > 1.1 * self._start
        beyond = high and self._start > 0 and loss > 1.2 * max(self._start, self._uniform)
        if self._first_losses < _IN_A_ROW:
            self._first_losses += 1
            if not beyond:
                self._start = max(self._start, loss)
                return
        self._high = self._high + 1 if high else 0
        if not high:
            self._warned = False
        if self._warned or not (beyond or self._high >= _IN_A_ROW):
            return
        self._warned = True
        if self._rank == 0:
            logger.warning(
                "step %d: THE RUN DIVERGES: loss %.4f is above the %.4f of its first steps; lower optimizer.lr, or "
                "lengthen lr_scheduler.warmup_steps",
                *(step, loss, self._start),
            )

    def _compare_with_guessing(self, step: int, loss: float) -> None:
        """Warn if the first loss of a run is far above that of guessing: a model without training is near it."""
        if self._rank == 0 and loss > 1.2 * self._uniform:
            logger.warning(
                "step %d: loss %.4f is far above the %.4f of guessing; look whether the weights, the tokenizer and the "
                "data belong together",
                *(step, loss, self._uniform),
            )

    def _see(self, step: int, record: StepRecord) -> None:
        if not record.is_bad:
            self.last_good = (step, record)
            return
        if self._skips(record):
            if self._rank == 0:
                counts = f"skipped {record.skipped}, {record.in_a_row} in a row"
                logger.warning("step %d skipped: %s (%s)", step, self._reason(record), counts)
            if record.in_a_row < self._training.max_skipped_in_a_row:
                return
        self.bad = (step, record)

    def _skips(self, record: StepRecord) -> bool:
        return self._training.on_bad_step == "skip" or not record.scored

    def claim(self) -> int:
        """Return 0 if no step is bad. Else return a positive number; the largest of all ranks belongs to the rank that
        explains the failure best: the earliest step, then a local loss that is not finite (the other reasons are the
        same on all ranks), then the lowest rank."""
        if self.bad is None:
            return 0
        step, record = self.bad
        finite = math.isfinite(record.local_loss)
        return _NONE_IS_LATER - ((step << (_RANK_BITS + 1)) + (finite << _RANK_BITS) + self._rank)

    def describe(self) -> str:
        """Describe the bad step and the last good values, for a message."""
        if self.bad is None:
            return ""
        step, record = self.bad
        advice = (
            "Lower optimizer.lr or training.max_norm, lengthen lr_scheduler.warmup_steps, or look at the data of that "
            "step"
        )
        leave_out = "--training.on_bad_step=skip leaves out the updates of such steps"
        if not record.scored:
            advice = "Look at the data: where prompts fill whole batches, nothing is learned"
        if self._skips(record):
            return (
                f"step {step}: {counted(record.in_a_row, 'skipped step')} in a row, and "
                f"training.max_skipped_in_a_row = {self._training.max_skipped_in_a_row}; this one for "
                f"{self._reason(record)}; {self._last_good()}. {advice}"
            )
        if _is_finite(record):
            return (
                f"step {step}: {self._reason(record)}; {self._last_good()}. {advice}; {leave_out}, "
                "--training.spike_sigmas=0 takes no finite loss for bad"
            )
        # A rank without the last pipeline stage has no loss of its own.
        rank, loss = "", record.loss
        if not math.isfinite(record.local_loss):
            rank, loss = f", rank {self._rank}", record.local_loss
        return (
            f"step {step}{rank}: loss {loss}, grad_norm {record.grad_norm} is not finite; {self._last_good()}. "
            f"{advice}; {leave_out}"
        )

    def _last_good(self) -> str:
        if self.last_good is None:
            return "no good step came before it since the start"
        at, good = self.last_good
        return f"the last good values were loss {good.loss:.4f}, grad_norm {good.grad_norm:.4f} at step {at}"

    def _reason(self, record: StepRecord) -> str:
        if not record.scored:
            return "none of its labels is scored"
        if not math.isfinite(record.loss):
            return f"loss {record.loss} is not finite"
        if not math.isfinite(record.grad_norm):
            return f"grad_norm {record.grad_norm} is not finite"
        sigmas = (record.loss - record.mean) / record.deviation
        return (
            f"loss {record.loss:.4f} is a spike, {sigmas:.1f} standard deviations above the mean of the last {WINDOW} "
            f"good steps (mean {record.mean:.4f}, standard deviation {record.deviation:.4f}, "
            f"training.spike_sigmas = {self._training.spike_sigmas:g})"
        )


def _is_finite(record: StepRecord) -> bool:
    return math.isfinite(record.loss) and math.isfinite(record.grad_norm)
