"""The function that refuses an option."""

from __future__ import annotations

from typing import NoReturn

from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError


def refuse(config: JobConfig, key: str, why: str) -> NoReturn:
    """Raise a :class:`ConfigError` for the option ``key`` ("section.key"), with its value and origin. ``why`` is the
    reason and the fix."""
    section, name = key.split(".")
    raise ConfigError(why, key=key, value=getattr(getattr(config, section), name), origin=config.origin(key))
