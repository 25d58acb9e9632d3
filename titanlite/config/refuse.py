"""The one way to refuse an option."""

from __future__ import annotations

from typing import NoReturn

from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError


def refuse(config: JobConfig, key: str, why: str) -> NoReturn:
    """Raise the :class:`ConfigError` of the option ``key``, "section.key": its value, where that came from, and ``why``
    it cannot be, with the fix."""
    section, name = key.split(".")
    raise ConfigError(why, key=key, value=getattr(getattr(config, section), name), origin=config.origin(key))
