"""The JSON schema of the TOML files, from the same options that load them. Editors complete and check keys with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from titanlite.config.aliases import with_aliases
from titanlite.config.options import Option, options_of
from titanlite.config.run_config import RUN_FOLDER
from titanlite.config.schema import JobConfig
from titanlite.config.unsupported import UNSUPPORTED

_TYPES: dict[type, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": -(1 << 63), "exclusiveMaximum": 1 << 64},
    float: {"type": "number"},
    str: {"type": "string"},
}
_OUTSIDE_SECTIONS = {
    "base": {"type": "string", "description": "The TOML file to build on: a path relative to this file, or a name."},
    RUN_FOLDER: {"type": "string", "description": "In config.toml of a run: its folder, relative to this file."},
}


def json_schema(config_class: type = JobConfig) -> dict[str, Any]:
    """Return the schema (draft 2020-12) of the files that load as a ``config_class``, with the older names of options.

    It says the same as the loader of one key: its type, choices and limits. What several keys must have together, and
    paths that must be there, it cannot say.
    """
    root = _section({})
    root["properties"] |= _OUTSIDE_SECTIONS
    for name, options in with_aliases(options_of(config_class)).items():  # type: ignore[arg-type]
        table = root
        for part in name.split("."):
            table = table["properties"].setdefault(part, _section({}))
        table["properties"] |= {key: _option(option) for key, option in options.items()}
    about = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A configuration of titanlite"}
    return about | root


def _section(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": dict(properties)}


def _option(option: Option) -> dict[str, Any]:
    name = option.alias_of or option.name
    schema = _values(option)
    # Keys of [validation] may say the same as those of [training].
    if name in UNSUPPORTED and option.section != "validation":
        schema = {"const": option.default} if option.default is not None else {"not": {}}
    text = f"Not implemented: {UNSUPPORTED[name]}." if name in UNSUPPORTED else option.help
    if option.alias_of:
        return {**schema, "deprecated": True, "description": f"The older name of {name}. {text}"}
    default = {} if option.default is None else {"default": option.default}
    return {**schema, **default, "description": text}


def _values(option: Option) -> dict[str, Any]:
    """Return the keywords for the values of an option."""
    if option.base is object:
        return {}
    if option.base is list:
        item = {"enum": [*option.choices]} if option.choices else {"type": "string"}
        # A string is a list too: its items are separated by commas.
        word = rf"\s*({'|'.join(option.choices)})?\s*"
        pattern = {"pattern": f"^{word}(,{word})*$"} if option.choices else {}
        return {"anyOf": [{"type": "array", "items": item}, {"type": "string", **pattern}]}
    if option.choices:
        return {"enum": [*option.choices]}
    return {**_TYPES[option.base], **(option.rule.keywords if option.rule else {})}


def dump_schema(schema: Mapping[str, Any]) -> str:
    """Return the schema as JSON text, with one option on a line."""
    return _dumped(schema, "") + "\n"


def _dumped(node: Mapping[str, Any], indent: str) -> str:
    inner = indent + "  "
    lines = []
    for key, value in node.items():
        nested = isinstance(value, dict) and (key == "properties" or "properties" in value)
        lines.append(f"{inner}{json.dumps(key)}: {_dumped(value, inner) if nested else json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
