"""The schema as a flat table of options: name, type, rule, default and help text of each key."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import math
import sys
import types
import typing
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from titanlite.config.value_rules import PATH, Rule
from titanlite.errors import ConfigError

_KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
}


@dataclass(frozen=True)
class Option:
    """One key of one section.

    ``base`` is ``bool``, ``int``, ``float``, ``str`` or ``list``. ``choices`` are the only valid values (for a list:
    of each item); ``object`` accepts every value. ``None`` is valid only if ``optional`` is true. ``alias_of`` is the
    present name of a renamed option.
    """

    section: str
    key: str
    base: type
    optional: bool
    choices: tuple[Any, ...]
    rule: Rule | None
    default: Any
    help: str
    alias_of: str = ""

    @property
    def name(self) -> str:
        return f"{self.section}.{self.key}"

    @property
    def is_path(self) -> bool:
        return self.rule is PATH

    def expected(self) -> str:
        """Describe the valid values, to complete the sentence "must be ..."."""
        if self.base is list:
            each = f", each one of {_quoted(self.choices)}" if self.choices else ""
            return f"a list of strings{each}"
        if self.choices:
            return f"one of {_quoted(self.choices)}"
        if self.rule is None and self.base is float:
            return "a finite number"
        return _KINDS[self.base] + (f", {self.rule.text}" if self.rule else "")

    def convert(self, value: Any, origin: str) -> Any:
        """Convert a TOML value to this option's type; raise :class:`ConfigError` with the rule if it is not valid."""
        if self.base is object:
            return value
        _check_representable(value, self.name, origin)
        items = value.split(",") if self.base is list and isinstance(value, str) else value
        if self.base is list and isinstance(items, list):
            good = all(isinstance(item, str) for item in items)
            items = [item.strip() for item in items if item.strip()] if good else items
            if good and (not self.choices or all(item in self.choices for item in items)):
                return items
        elif self.base is float and type(value) in (int, float):
            if math.isfinite(value) if self.rule is None else self.rule.holds(value):
                return float(value)
        elif (
            type(value) is self.base
            and (not self.choices or value in self.choices)
            and (self.rule is None or self.rule.holds(value))
        ):
            return value
        raise ConfigError(f"must be {self.expected()}", key=self.name, value=value, origin=origin)

    def parse(self, text: str, origin: str) -> Any:
        """Convert a command-line string to this option's type; raise :class:`ConfigError` if it is not valid."""
        value: Any = text
        if self.optional and text.lower() == "none":
            return None
        if self.base is bool:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        elif self.base in (int, float):
            with contextlib.suppress(ValueError):
                value = self.base(text)
        return self.convert(value, origin)


def _check_representable(value: Any, key: str, origin: str) -> None:
    """Refuse a value that config.toml, the log or torch cannot hold."""
    for item in value if isinstance(value, list) else [value]:
        if type(item) is int and not -(1 << 63) <= item < 1 << 64:
            raise ConfigError("must be a whole number below 2^64", key=key, value=item, origin=origin)
        if isinstance(item, str):
            # The command line turns bytes that are no UTF-8 into surrogates, which have no UTF-8 either.
            readable = item.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")
            if readable != item:
                why = "must be text in UTF-8, without the character of code 0; rename the file if it is one's name"
                raise ConfigError(why, key=key, value=readable, origin=origin)


def _quoted(values: tuple[Any, ...]) -> str:
    return ", ".join(f'"{v}"' for v in values)


def _option(section: str, field: dataclasses.Field[Any], hint: Any, text: str) -> Option:
    union = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    optional = type(None) in union
    if len(hints := [arg for arg in union if arg is not type(None)]) == 1:
        (hint,) = hints
    rule = None
    if typing.get_origin(hint) is typing.Annotated:
        hint, rule = typing.get_args(hint)
    base = hint
    choices: tuple[Any, ...] = ()
    if typing.get_origin(base) is list:
        base, (item,) = list, typing.get_args(base)
        choices = typing.get_args(item) if typing.get_origin(item) is Literal else ()
        base = base if choices or item is str else hint
    elif typing.get_origin(base) is Literal:
        base, choices = str, typing.get_args(base)
    if base not in (*_KINDS, list, object) or not all(isinstance(choice, str) for choice in choices):
        kinds = "bool, int, float, str, Literal[strings], list[str] and list[Literal[strings]], each also with None"
        raise TypeError(f"{section}.{field.name} is {hint}, and the types of options are {kinds}")
    if field.default is field.default_factory is dataclasses.MISSING:
        raise TypeError(f"{section}.{field.name} has no default")
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()  # type: ignore[misc, operator]
    return Option(section, field.name, base, optional, choices, rule, default, text)


@cache
def _help_texts(module: str) -> dict[tuple[str, str], str]:
    """Return the string under each field of each class of a module, by (class, field)."""
    texts = {}
    for cls in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for before, after in zip(cls.body, cls.body[1:], strict=False):
            if (
                isinstance(before, ast.AnnAssign)
                and isinstance(before.target, ast.Name)
                and isinstance(after, ast.Expr)
                and isinstance(after.value, ast.Constant)
            ):
                texts[cls.name, before.target.id] = " ".join(str(after.value.value).split())
    return texts


def section_options(section: str, cls: type) -> dict[str, Option]:
    """Return the options of one section's dataclass, with inherited ones, by key."""
    hints = typing.get_type_hints(cls, include_extras=True)
    texts: dict[str, str] = {}
    for parent in reversed(cls.__mro__[:-1]):
        texts.update(
            {key: text for (owner, key), text in _help_texts(parent.__module__).items() if owner == parent.__name__}
        )
    fields = [f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name])]
    return {f.name: _option(section, f, hints[f.name], texts.get(f.name, "")) for f in fields}


@cache
def options_of(config_class: type) -> dict[str, dict[str, Option]]:
    """Return ``{section: {key: option}}`` of a JobConfig class."""
    return {section: section_options(section, cls) for section, cls in sections_of(config_class).items()}


def sections_of(config_class: type, outer: str = "") -> dict[str, type]:
    """Return the dataclass of each section by its name; a section in another is "outer.inner", and comes after it."""
    sections: dict[str, type] = {}
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if dataclasses.is_dataclass(hints[field.name]):
            sections[f"{outer}{field.name}"] = hints[field.name]
            sections |= sections_of(hints[field.name], f"{outer}{field.name}.")
    return sections
