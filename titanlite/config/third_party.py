"""Code of third parties that a configuration names: its import, and the sections that it adds."""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
import typing
from pathlib import Path
from typing import Any

from titanlite.config.run_config import was_made_here
from titanlite.config.schema import JobConfig
from titanlite.environment import say_once
from titanlite.errors import ConfigError


def merge(custom: type) -> type[JobConfig]:
    """Return JobConfig with the sections of ``custom``. A section that is in both has the keys of both; a key that is
    in both has the type of ours and the default of theirs.

    Raises:
        TypeError: a section is no dataclass, or a key of both has another type.
    """
    base, extension = typing.get_type_hints(JobConfig), typing.get_type_hints(custom)
    merged: dict[str, type] = {**base, **extension}
    for section, theirs in extension.items():
        if not (isinstance(theirs, type) and dataclasses.is_dataclass(theirs)):
            raise TypeError(f"{section} must be a section, which is a dataclass, and is {theirs}")
        ours = base.get(section, theirs)
        if theirs is not ours:
            content = {"__module__": theirs.__module__, **_keys_of_both(section, ours, theirs)}
            bases = (theirs,) if issubclass(theirs, ours) else (theirs, ours)
            merged[section] = dataclasses.dataclass(type(ours.__name__, bases, content))
    fields = [(section, cls, dataclasses.field(default_factory=cls)) for section, cls in merged.items()]
    config_class = dataclasses.make_dataclass("JobConfig", fields, bases=(JobConfig,))
    config_class.__annotations__ = dict(merged)
    return config_class


def _keys_of_both(section: str, ours: type, theirs: type) -> dict[str, Any]:
    """Return the annotations and fields of a class with the keys that are in both."""
    hints, plain = typing.get_type_hints(ours, include_extras=True), typing.get_type_hints(ours)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(theirs):
        if field.name in hints:
            if (kind := typing.get_type_hints(theirs)[field.name]) != plain[field.name]:
                raise TypeError(f"{section}.{field.name} is there already, as {plain[field.name]} and not {kind}")
            fields[field.name] = dataclasses.field(default=field.default, default_factory=field.default_factory)  # type: ignore[call-overload]
    return {"__annotations__": {name: hints[name] for name in fields}, **fields}


def import_custom(config: JobConfig) -> None:
    """Import the module that ``experimental.custom_import`` names, if it names one."""
    key = "experimental.custom_import"
    if config.experimental.custom_import:
        origin = config.origin(key)
        file = config.run_config
        named_there = file is not None and origin.startswith(str(file))
        import_module(config.experimental.custom_import, key, origin, file if named_there else None)


def import_module(name: str, key: str, origin: str, run_config: Path | None = None) -> Any:
    """Import the module that the option ``key`` names; raise :class:`ConfigError` if there is no such module.

    Args:
        run_config: the config.toml of a run folder, if that is what names the module. The import of its code is said
            first, unless this user has made the folder.
    """
    if run_config is not None and not was_made_here(run_config.parent):
        say_once(
            f'titanlite: {key} = "{name}" ({origin}): the code of this module is imported now, because the '
            "configuration of a run folder that you did not make here names it"
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    missing = ConfigError(
        f"there is no such module; it must be importable from {os.getcwd()} or installed",
        key=key,
        value=name,
        origin=origin,
    )
    if name.startswith("."):
        raise missing
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if e.name is None or not (name + ".").startswith(e.name + "."):
            raise  # the module exists, but one of its imports does not: an error of the module
        raise missing from None
