"""The options that differ between two configurations."""

from __future__ import annotations

from typing import Any

from titanlite.config.job_name import without_reason
from titanlite.config.load import load_config
from titanlite.config.options import options_of
from titanlite.config.schema import JobConfig


def differing_options(first: str, second: str) -> dict[str, tuple[Any, Any]]:
    """Return the options with other values in two TOML files, by ``section.key``: files, packaged names, or config.toml
    of runs. Bases and defaults count, so that it is the difference in effect.

    Raises:
        ConfigError: a file cannot be loaded.
    """
    configs = [load_config([f"--job.config_file={file}"]) for file in (first, second)]
    outside = {"job.config_file"}
    if any(config.run_config for config in configs):  # of each run another one
        outside |= {"job.dump_folder", "job.name"}
    names = [name for config in configs for name in _names(config) if name not in outside]
    values = {name: tuple(_value(config, name) for config in configs) for name in names}
    return {name: (old, new) for name, (old, new) in values.items() if old != new}


def _names(config: JobConfig) -> list[str]:
    return [option.name for keys in options_of(type(config)).values() for option in keys.values()]  # type: ignore[arg-type]


def _value(config: JobConfig, name: str) -> Any:
    """Return an option; None if the configuration does not have it, as with options of a user's own module."""
    try:
        return without_reason(name, config.value(name))
    except AttributeError:
        return None
