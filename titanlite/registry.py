"""The one registry behind models, converters, optimizers, schedules and data sources."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from titanlite.errors import ConfigError

T = TypeVar("T")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for error messages: `` (did you mean "x"?)``, or nothing where no name is close."""
    by_lower = {entry.lower(): entry for entry in known}
    matches = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.5)
    return f' (did you mean "{by_lower[matches[0]]}"?)' if matches else ""


class Registry(Generic[T]):
    """Names and what stands behind them.

    Args:
        kind: what an entry is, for messages ("converter").
        key: the option that selects an entry ("model.converters").
    """

    def __init__(self, kind: str, key: str) -> None:
        self.kind = kind
        self.key = key
        self._entries: dict[str, T] = {}

    def add(self, name: str, entry: T) -> T:
        """Register ``entry``; a name that is taken is a ``ValueError``."""
        if name in self._entries:
            raise ValueError(f'the {self.kind} "{name}" is registered already')
        self._entries[name] = entry
        return entry

    def register(self, name: str) -> Callable[[T], T]:
        """:meth:`add` as a decorator."""
        return lambda entry: self.add(name, entry)

    def get(self, name: str) -> T:
        """The entry, or a :class:`ConfigError` that lists the known names."""
        if name not in self._entries:
            raise ConfigError(
                f"there is no such {self.kind}{nearest(name, self._entries)}; known: {', '.join(self.names())}",
                key=self.key,
                value=name,
            )
        return self._entries[name]

    def names(self) -> list[str]:
        return sorted(self._entries)
