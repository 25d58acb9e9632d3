"""Read the files of a tokenizer. They may come from anybody: a file has a largest size, those beside it lie in its
folder, and one that is damaged is refused by its name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from titanlite.errors import ConfigError
from titanlite.untrusted.files import Untrusted, contained, read_bytes, read_json

KEY = "model.tokenizer_path"
MAX_BYTES = 100_000_000  # of a vocabulary; published ones have at most 35 MB
MAX_CONFIG_BYTES = 10_000_000  # of a file beside it; published ones have at most 1.2 MB
MAX_IDS = 1 << 22  # of a vocabulary; published ones have at most a million


def damaged(file: str | Path, why: str) -> ConfigError:
    """Return the error for a tokenizer that cannot be used; ``why`` is the reason and the fix."""
    return ConfigError(why, key=KEY, value=str(file))


def excerpt(content: object) -> str:
    """Return what a file or an error about it says, short enough for a message, and printable."""
    text = str(content)
    text = text if len(text) <= 200 else f"{text[:120]} ... {text[-60:]}"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def is_there(folder: Path, name: str) -> bool:
    """Return True if ``name`` is a regular file of ``folder``, False if there is nothing of that name.

    Raises:
        ConfigError: it is something else, such as a folder or a link that leads out of ``folder``, or the system does
            not say.
    """
    file = folder / name
    with _naming(file):
        if not os.path.lexists(file):
            return False
        if not contained(folder, name).is_file():
            raise Untrusted(file, "is no regular file, or a link to nothing; put the file itself there, or delete this")
    return True


def read_limited(file: Path, limit: int) -> bytes:
    """Return the content of a file of at most ``limit`` bytes. One that lies beside the file that the user named is
    looked for by :func:`is_there` first.

    Raises:
        ConfigError: it cannot be read, or is larger.
    """
    with _naming(file):
        return read_bytes(file, limit)


def read_object(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of ``folder`` of at most 10 MB; an empty one if there is no such file.

    Raises:
        ConfigError: the file cannot be read, is larger, leads out of ``folder``, or holds something else.
    """
    if not is_there(folder, name):
        return {}
    with _naming(folder / name):
        return read_json(folder / name, MAX_CONFIG_BYTES)


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turn the errors about ``file`` into those of a tokenizer."""
    try:
        yield
    except OSError as e:
        raise damaged(file, f"cannot be read ({e.strerror or e}); correct the path or its permissions") from None
    except Untrusted as e:
        raise damaged(file, e.problem) from None


class Panic(Exception):
    """The tokenizers library has failed in a way that it did not foresee."""


@contextmanager
def panics_as_exceptions() -> Iterator[None]:
    """Turn a panic of the tokenizers library, which is no ``Exception``, into :class:`Panic`."""
    try:
        yield
    except BaseException as e:
        if type(e).__name__ != "PanicException":
            raise
        raise Panic(str(e)) from None


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what is written to stderr meanwhile: a panic prints a stack trace there before it can be caught."""
    try:
        kept = os.dup(2)
    except OSError:  # it is closed
        yield
        return
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
