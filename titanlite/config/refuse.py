"""The function that refuses an option."""

from __future__ import annotations

from typing import NoReturn

from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError


def refuse(config: JobConfig, key: str, why: str) -> NoReturn:
    """Raise a :class:`ConfigError` for the option ``key`` ("section.key"), with its value and origin. ``why`` is the
    reason and the fix."""
    raise ConfigError(why, key=key, value=config.value(key), origin=config.origin(key))
