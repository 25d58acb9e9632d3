"""Optimizers, learning-rate schedules and the loss, each a function in a registry; and what keeps bad steps out."""

from titanlite.optim.loss import cross_entropy_loss
from titanlite.optim.optimizers import build_optimizer, register_optimizer
from titanlite.optim.schedules import Schedule, build_schedule, register_decay
from titanlite.optim.step_guard import StepGuard

__all__ = [
    "Schedule",
    "StepGuard",
    "build_optimizer",
    "build_schedule",
    "cross_entropy_loss",
    "register_decay",
    "register_optimizer",
]
