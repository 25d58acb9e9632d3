"""The errors that titanlite raises on purpose; each message states the value, the rule and the fix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

_MOST_SHOWN = 20_000  # characters of a message


def shown(value: object) -> str:
    """A value as it would stand in a TOML file; None is "unset"."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (str, PurePath)):
        return f'"{value}"'
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    return "unset" if value is None else str(value)


def counted(number: int, noun: str) -> str:
    """A number with its noun: "1 shard", "2 processes"."""
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def printable(text: str, kept: str = "") -> str:
    """Escape characters that would move the cursor of a terminal, or write to its clipboard, except those in ``kept``.
    A text in a file from somebody else could have them."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


class ConfigError(Exception):
    """A request that cannot be met: a bad option, file, or combination.

    The command line shows the message alone and ends with exit status 2. Where one option is to blame, the message is
    ``key = value (origin): why``.

    Args:
        why: the rule that is broken, and how to mend it.
        key: the option, ``section.key``; empty where no option alone is to blame.
        value: of the option.
        origin: where the value came from, a file and line or an argument; empty where that is not known. Whoever has
            the configuration fills it in before the message is shown.
    """

    def __init__(self, why: str, *, key: str = "", value: object = None, origin: str = "") -> None:
        super().__init__(why)
        self.why, self.key, self.value, self.origin = why, key, value, origin

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        text = f"{self.key} = {shown(self.value)}{origin}: {self.why}" if self.key else self.why
        if len(text) > _MOST_SHOWN:
            text = f"{text[: _MOST_SHOWN // 2]} ... {text[-_MOST_SHOWN // 2 :]}"
        return printable(text, kept="\n")

    def __reduce__(self) -> Any:
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[ConfigError], args: tuple[Any, ...], attributes: dict[str, Any]) -> ConfigError:
    """An error that was sent from another process."""
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error


class TrainingError(Exception):
    """A run that had started had to be stopped, for example because the loss is no longer finite.

    The command line shows the message alone and ends with exit status 1.
    """


@contextmanager
def renaming(rename: Callable[[str], str]) -> Iterator[None]:
    """Apply ``rename`` to the messages of errors, for an option that has another name than where they come from."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(rename(e.why), key=rename(e.key), value=e.value, origin=e.origin) from e
    except TrainingError as e:
        raise TrainingError(rename(str(e))) from e


class NothingToDo(Exception):
    """The run that was asked for has been made already. No error: the command line says so and ends with status 0."""
