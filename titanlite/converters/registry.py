"""The interface of converters, and their registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from titanlite.config import JobConfig
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.registry import Registry


@dataclass(frozen=True)
class TimedOption:
    """An option of a converter that a run decides by the time of a block.

    Attributes:
        name: ``section.key``. The option ``section.key_chosen`` takes the decision.
        kinds: the two values to try, each with its name in messages.
        by_count: the one that is better by the counts of bytes and launches.
    """

    name: str
    kinds: Mapping[str, str]
    by_count: str


class ModelConverter(Protocol):
    """A transformation of a model, after it is built on the meta device and before it is sharded.

    One to a number format has a static method ``has_units(architecture) -> bool``: whether GPUs of that architecture,
    or this CPU, have units for it. One that the advice on memory may name, where the device has units for it, also has
    a static method ``is_native(device) -> bool``. One with an option that a run times has a static method
    ``option_to_time(config, device) -> TimedOption | None``; None: there is nothing to decide.
    """

    def convert(self, model: nn.Module) -> str:
        """Change ``model`` in place, and return a summary for the log. Raises :class:`~titanlite.errors.ConfigError` if
        there is nothing to convert."""
        ...

    def post_optimizer_hook(self, model: nn.Module) -> None:
        """Update ``model``, one of this process's pipeline stages, after an optimizer step."""
        ...


_registry: Registry[Callable[[JobConfig, Mesh], ModelConverter]] = Registry("converter", "model.converters")
register_converter = _registry.register


def native_formats(device: torch.device) -> list[str]:
    """Return the names of the converters to number formats that save memory and that ``device`` has units for."""
    return [name for name in _registry.names() if getattr(_registry.get(name), "is_native", lambda _: False)(device)]


def formats_with_units(architecture: str) -> list[str]:
    """Return the names of the converters to number formats that an architecture, or this CPU, has units for."""
    return [
        name for name in _registry.names() if getattr(_registry.get(name), "has_units", lambda _: False)(architecture)
    ]


def options_to_time(config: JobConfig, device: torch.device) -> list[TimedOption]:
    """Return the options that a run on ``device`` decides by the time of a block."""
    functions = (getattr(_registry.get(name), "option_to_time", None) for name in config.model.converters)
    options = (function(config, device) for function in functions if function is not None)
    return [option for option in options if option is not None]


def build_converters(config: JobConfig, mesh: Mesh) -> dict[str, ModelConverter]:
    """Return the converters that ``model.converters`` lists, by name, in its order."""
    names = config.model.converters
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"{repeated[0]} is listed twice; list it once", key="model.converters", value=",".join(names))
    return {name: _registry.get(name)(config, mesh) for name in names}
