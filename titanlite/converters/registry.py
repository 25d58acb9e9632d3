"""The interface of converters, and their registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from titanlite.config import JobConfig
from titanlite.distributed.mesh import Mesh
from titanlite.errors import ConfigError
from titanlite.registry import Registry


class ModelConverter(Protocol):
    """Changes a model after it is built on the meta device and before it is sharded.

    One that computes in a number format has a static method ``is_native(device) -> bool`` too.
    """

    def convert(self, model: nn.Module) -> str:
        """Change ``model`` in place; returns what was done, for the log. Nothing to convert is a
        :class:`~titanlite.errors.ConfigError`."""
        ...

    def post_optimizer_hook(self, model: nn.Module) -> None:
        """Called after every optimizer step, for each pipeline stage that this process has."""
        ...


_registry: Registry[Callable[[JobConfig, Mesh], ModelConverter]] = Registry("converter", "model.converters")
register_converter = _registry.register


def native_formats(device: torch.device) -> list[str]:
    """Return the converters to a number format that ``device`` has units for."""
    return [name for name in _registry.names() if getattr(_registry.get(name), "is_native", lambda _: False)(device)]


def build_converters(config: JobConfig, mesh: Mesh) -> dict[str, ModelConverter]:
    """The converters that ``model.converters`` lists, by name, in its order."""
    names = config.model.converters
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"{twice[0]} stands there twice; name it once", key="model.converters", value=",".join(names))
    return {name: _registry.get(name)(config, mesh) for name in names}
