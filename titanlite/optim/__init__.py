"""Optimizers, learning-rate schedules and the loss, each a function in a registry."""

from titanlite.optim.loss import IGNORED, cross_entropy_loss
from titanlite.optim.optimizers import build_optimizer, register_optimizer
from titanlite.optim.schedules import Schedule, build_schedule, register_decay
from titanlite.optim.update import update_parameters

__all__ = [
    "IGNORED",
    "Schedule",
    "build_optimizer",
    "build_schedule",
    "cross_entropy_loss",
    "register_decay",
    "register_optimizer",
    "update_parameters",
]
