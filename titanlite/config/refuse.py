"""The functions that refuse an option."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, NoReturn

from titanlite.config.schema import JobConfig
from titanlite.errors import ConfigError


def refuse(config: JobConfig, key: str, why: str) -> NoReturn:
    """Raise a :class:`ConfigError` for the option ``key`` ("section.key"), with its value and origin. ``why`` is the
    reason and the fix."""
    raise ConfigError(why, key=key, value=config.value(key), origin=config.origin(key))


def check_converter(config: JobConfig, section: Any, name: str) -> bool:
    """Return whether the converter ``name`` is used.

    Raises:
        ConfigError: it is not, and an option of its ``section`` is set. ``filter_fqns`` alone is allowed: published
            files have it together with ``converters = []``.
    """
    if name in config.model.converters:
        return True
    defaults = type(section)()
    for field in fields(section):
        if field.name != "filter_fqns" and getattr(section, field.name) != getattr(defaults, field.name):
            refuse(
                config,
                f"{name}.{field.name}",
                f"has no effect without the converter; add {name} to model.converters",
            )
    return False
