"""The live status of a run on a terminal: one line below the log."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

from titanlite.metrics.terminal import joined, paint

SMOOTHED = 20  # steps, over which the smoothed loss is the mean
_WIDEST_BAR = 30
_SHORTEST_BAR = 8


def mean_loss(losses: Sequence[float]) -> float | None:
    """Return the mean of the last :data:`SMOOTHED` of ``losses``; None if there are none."""
    last = [*losses][-SMOOTHED:]
    return sum(last) / len(last) if last else None


def plain_loss(loss: float) -> str:
    """Format a loss in the same number of columns, whatever its size."""
    return f"{loss:7.4f}" if abs(loss) < 100 else f"{loss:7.3g}"


class Progress:
    """Where a run stands, and how that is shown in one line.

    Attributes:
        losses: those of the latest steps, the last one last; somebody else adds to them.

    Args:
        steps: the last step.
        interval: of checkpoints, in steps; None: there are none.
        colored, unicode: what the terminal can show.
    """

    def __init__(self, steps: int, interval: int | None = None, *, colored: bool = False, unicode: bool = True) -> None:
        self.losses: Sequence[float] = ()
        self._steps, self._interval = steps, interval
        self._colored, self._unicode = colored, unicode
        self._step = 0
        self._tokens = 0.0
        self._ends: deque[float] = deque(maxlen=SMOOTHED + 1)  # the times at which the latest steps ended
        self._doing = ["setting up"]
        self._since = time.monotonic()

    def begin(self, step: int, task: str) -> None:
        """Training begins after ``step``; until the next step is done, ``task`` is shown."""
        self._step = step
        self._now(task)

    def step_done(self, step: int, tokens: float) -> None:
        """Count a step of so many tokens of this device."""
        self._step, self._tokens = step, tokens
        self._ends.append(time.monotonic())
        if self._doing[0]:
            self._now("")

    @contextmanager
    def doing(self, task: str) -> Iterator[None]:
        """Show a task in the place of the steps until the context ends. The time of the task is no time of a step."""
        before, began = self._doing, time.monotonic()
        self._now(task)
        try:
            yield
        finally:
            took = time.monotonic() - began
            self._ends = deque((end + took for end in self._ends), maxlen=self._ends.maxlen)
            self._doing, self._since = before, time.monotonic()

    def _now(self, task: str) -> None:
        self._doing, self._since = [task], time.monotonic()

    def line(self, width: int) -> str:
        """Return the status in at most ``width`` columns."""
        task = self._doing[0]
        seconds = time.monotonic() - self._since
        fields = [f"step {self._step:,}/{self._steps:,}"] if self._step else []
        if task:
            fields = [f"{task}, {duration(seconds)}", *fields]
        step_time = self._step_time()
        if step_time is not None:
            left = (self._steps - self._step) * step_time
            fields.append(f"{duration(left)} left")
            if (loss := mean_loss(self.losses)) is not None:
                fields.append(f"mean loss {plain_loss(loss).strip()}")
            fields.append(f"{self._tokens / step_time:,.0f} tok/s")
            if self._interval:
                following = min(self._steps, (self._step // self._interval + 1) * self._interval)
                fields.append(f"checkpoint at {following:,}")
        text = joined(fields, width)
        room = min(width - len(text) - 2, _WIDEST_BAR)
        if not self._step or room < _SHORTEST_BAR:
            return text
        return f"{self._bar(room)}  {text}"

    def _step_time(self) -> float | None:
        """Return the median of the latest steps, which a pause or a compilation does not change."""
        ends = [*self._ends]
        times = [after - before for before, after in pairwise(ends)]
        return max(statistics.median(times), 1e-9) if times else None

    def _bar(self, width: int) -> str:
        filled = round(min(self._step / self._steps, 1.0) * width)
        full, empty = "━─" if self._unicode else "#-"
        return paint(full * filled, "cyan", self._colored) + paint(empty * (width - filled), "dim", self._colored)


def duration(seconds: float) -> str:
    whole = int(seconds)
    if whole >= 3600:
        return f"{whole // 3600}h{whole // 60 % 60:02}m"
    return f"{whole // 60}m{whole % 60:02}s" if whole >= 60 else f"{whole}s"
