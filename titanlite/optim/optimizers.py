"""Optimizers by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from titanlite.config.schema import Optimizer
from titanlite.config.stored_weights import OPTIMIZERS
from titanlite.optim.low_precision import LowPrecisionAdam
from titanlite.optim.sgd import SGD
from titanlite.quant.stored import stored_weight
from titanlite.registry import Registry

Builder = Callable[[Iterable[nn.Parameter], Optimizer], torch.optim.Optimizer]
_registry: Registry[Builder] = Registry("optimizer", "optimizer.name")
register_optimizer = _registry.register


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], options: Optimizer, seed: int = 0
) -> torch.optim.Optimizer:
    """Build the optimizer that ``[optimizer]`` describes; the schedule sets its learning rate at each step.

    Args:
        named: the parameters of this process with their names. Frozen ones are left out.
        seed: of the run, for the rounding of weights and moments of low precision.
    """
    named = [(name, param) for name, param in named if param.requires_grad]
    builder = _registry.get(options.name)
    stored = any(stored_weight(param) is not None for _, param in named)
    if stored and options.name not in OPTIMIZERS:
        raise ValueError(f"{options.name}: does not update weights that are stored in a number format")
    if options.name == "SGD" and (stored or options.implementation == "fused"):  # torch's does not take DTensors
        return SGD(named, options, seed)
    if stored or options.moments != "float32":
        return LowPrecisionAdam(named, options, seed)
    return builder([param for _, param in named], options)


def _adam_options(options: Optimizer) -> dict[str, Any]:
    return {
        "lr": options.lr,
        "betas": (options.beta1, options.beta2),
        "eps": options.eps,
        "weight_decay": options.weight_decay,
        "fused": options.implementation == "fused",
        "foreach": options.implementation == "foreach",
    }


@register_optimizer("AdamW")
def _adamw(params: Iterable[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **_adam_options(options))


@register_optimizer("Adam")
def _adam(params: Iterable[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, **_adam_options(options))


@register_optimizer("SGD")
def _sgd(params: Iterable[nn.Parameter], options: Optimizer) -> torch.optim.Optimizer:
    foreach = options.implementation == "foreach"
    return torch.optim.SGD(params, lr=options.lr, weight_decay=options.weight_decay, foreach=foreach)
