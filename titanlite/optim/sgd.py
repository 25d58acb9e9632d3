"""Stochastic gradient descent, one compiled pass per parameter, also of weights that are stored in a number format."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from titanlite.config.schema import Optimizer
from titanlite.optim.by_parameter import ByParameter, Place, Settings, compiled_update


class SGD(ByParameter):
    """SGD without momentum. The formula is that of :class:`torch.optim.SGD`. Its state is the number of steps, which
    the rounding depends on."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], options: Optimizer, seed: int) -> None:
        super().__init__(named, options, seed, {"lr": options.lr, "weight_decay": options.weight_decay})
        self._sgd = sgd if self._fused else _sgd

    def numbers(self, group: dict[str, Any]) -> list[float]:
        return [group["lr"], group["weight_decay"]]

    def create_state(self, param: Tensor) -> dict[str, Tensor]:
        return {"step": torch.zeros((), device=param.device)}

    def update(
        self, weight: Tensor, grad: Tensor, state: list[Tensor | None], settings: Settings, place: Place
    ) -> None:
        (step,) = state
        assert step is not None
        self._sgd(weight, grad, step, *settings)


def _sgd(param: Tensor, grad: Tensor, step: Tensor, numbers: Tensor, divisor: Tensor, skip: Tensor) -> None:
    """Update a shard of a parameter in place, and count the step. ``numbers``: float32 [2], learning rate and weight
    decay; ``divisor`` and ``skip``: see :class:`~titanlite.optim.by_parameter.Settings`."""
    lr, decay = numbers.unbind()
    weight = param.float()
    updated = weight - lr * (grad.float() / divisor + decay * weight)
    param.copy_(torch.where(skip != 0, param, updated.to(param.dtype)))
    step.copy_(torch.where(skip != 0, step, step + 1))


sgd = compiled_update(_sgd, "sgd", "updates by SGD", changed=("param", "step"))
