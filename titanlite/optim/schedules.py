"""Learning-rate schedules: linear warm-up, then constant, then decay. A schedule is a pure function of the step, so
that resuming a run needs no state."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from titanlite.config.schema import LRScheduler
from titanlite.registry import Registry

logger = logging.getLogger(__name__)

# Functions of the progress of the decay (0 to 1). The value goes from 1 (the peak) to 0 (lr_min).
_decays: Registry[Callable[[float], float]] = Registry("decay type", "lr_scheduler.decay_type")
register_decay = _decays.register
_decays.add("linear", lambda progress: 1 - progress)
_decays.add("sqrt", lambda progress: 1 - math.sqrt(progress))
_decays.add("cosine", lambda progress: 0.5 * (1 + math.cos(math.pi * progress)))


@dataclass(frozen=True)
class Schedule:
    """The learning rate of every step.

    Attributes:
        warmup_steps: the steps of the linear rise; step s of them has ``s / warmup_steps`` of the peak.
        decay_start: the last step at the peak. After it the learning rate reaches ``lr_min`` in ``decay_steps`` steps.
    """

    peak_lr: float
    warmup_steps: int
    decay_start: int
    decay_steps: int
    decay: Callable[[float], float]
    lr_min: float

    def lr(self, step: int) -> float:
        """Return the learning rate of ``step``, counted from 1."""
        if step <= self.warmup_steps:
            return self.peak_lr * step / self.warmup_steps
        if step <= self.decay_start:
            return self.peak_lr
        remaining = self.decay(min((step - self.decay_start) / self.decay_steps, 1.0))
        return self.peak_lr * (self.lr_min + (1 - self.lr_min) * remaining)

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the learning rate of ``step`` on every parameter group, and return it."""
        lr = self.lr(step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        return lr


def build_schedule(options: LRScheduler, peak_lr: float, steps: int) -> Schedule:
    """Build the schedule that ``[lr_scheduler]`` describes for a run of ``steps`` steps. It is torchtitan's since 11
    June 2025: a warm-up longer than the run is as long as the run."""
    warmup = min(options.warmup_steps, steps)
    after_warmup = steps - warmup
    decay = after_warmup if options.decay_ratio is None else round(steps * options.decay_ratio)
    if warmup == steps:
        logger.warning(
            "lr_scheduler.warmup_steps = %d, training.steps = %d: the learning rate rises over all steps, to its peak "
            "at the last one, and never decays",
            options.warmup_steps,
            steps,
        )
        decay = 0
    elif decay > after_warmup:
        logger.warning(
            "lr_scheduler: %d warm-up steps and %d of decay are more than training.steps = %d: decay over %d",
            warmup,
            decay,
            steps,
            after_warmup,
        )
        decay = after_warmup
    # The decay would end one step after the run, as torchtitan's does, so that no step runs at a rate of zero.
    return Schedule(peak_lr, warmup, steps + 1 - decay, decay, _decays.get(options.decay_type), options.lr_min)
