"""Read files that somebody else may have made.

No such file runs code, opens a file outside its folder, or makes the process take memory without bound. Every function
raises an error whose message names the file.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pickle
import stat
from collections.abc import Collection
from functools import cache
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, BinaryIO, ClassVar, Union, get_args, get_origin

from titanlite.errors import ConfigError

MOST_JSON = 1 << 26  # bytes; the largest published index has 20 MB


class Untrusted(ConfigError):
    """A file holds what it must not, or not what it must; the message names the file and says what to do."""


class NamesCode(ConfigError):
    """A pickle names code that does not belong into it. Nothing of the file was run."""


# ---- paths


def contained(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` of ``folder``, which need not exist.

    A link is followed only to a file of the same folder. In the Hub's cache it may lead to a file of the same
    repository: there, ``snapshots/<revision>/`` has links to ``blobs/``.

    Raises:
        Untrusted: the name, or a link, leads out of the folder.
    """
    if not name.isprintable() or name in ("", ".") or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise Untrusted(f"{folder} names the file {name!r}, which is not in that folder; download it again")
    file, border = folder / name, _border(Path(os.path.realpath(folder)))
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(border):
        raise Untrusted(f"{file} is a link to {target}, outside of {border}; put the file itself there")
    return file


def _border(folder: Path) -> Path:
    for parent in folder.parents:
        if parent.name == "snapshots" and parent.parent.name.startswith("models--"):
            return parent.parent
    return folder


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to read. A pipe or a device could block the reader, or never end.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a folder fails by itself
        raise OSError(errno.EINVAL, "it is a pipe, a socket or a device", str(path))
    return path.open("rb")


# ---- JSON


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        Untrusted: the file cannot be read, is too large, or does not hold a JSON object.
    """
    try:
        with open_file(file) as stream:
            text = stream.read(MOST_JSON + 1)
        return json_object(text, file)
    except OSError as e:
        raise Untrusted(f"{file}: cannot be read as JSON ({e}); repair it or download it again") from None


def json_object(text: bytes, file: Path) -> dict[str, Any]:
    """Return the object that ``text``, read from ``file``, holds; see :func:`read_json`."""
    if len(text) > MOST_JSON:
        raise Untrusted(f"{file}: has more than {MOST_JSON >> 20} MiB, too much for this file; download it again")
    try:
        content = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise Untrusted(f"{file}: cannot be read as JSON ({e}); repair it or download it again") from None
    if not isinstance(content, dict):
        raise Untrusted(f"{file}: holds no JSON object; repair it or download it again")
    return content


def is_of(value: Any, kind: Any) -> bool:
    """Return True if ``value``, read from JSON, is of the type ``kind``, as a field of a dataclass declares it. A whole
    number is at least 0 and has 64 bits at most."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, part) for part in get_args(kind))
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 64
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_of(item, get_args(kind)[0]) for item in value)
    return kind is Any or isinstance(value, get_origin(kind) or kind)


# ---- pickles


class Record:
    """What a pickle says of an object: the ``kind`` (module and name), the arguments and the state. It is data."""

    kind = ""
    args: tuple[Any, ...] = ()
    state: Any = None

    def __init__(self, *args: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


@cache
def _record_of(kind: str) -> type[Record]:
    return type("Record", (Record,), {"kind": kind})


# The operations of the pickles that torch and DCP write: those that make plain values, and those that make records.
_OPERATIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID),
)


class _Unpickler(pickle._Unpickler):
    """Reads a pickle as data: a class that it names becomes a kind of :class:`Record`, and nothing is imported.

    It is Python's own reader in Python: the one in C allocates whatever length a file states.
    """

    dispatch: ClassVar = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _OPERATIONS}

    def __init__(self, data: bytes, kinds: Collection[str]) -> None:
        super().__init__(io.BytesIO(data))
        self._kinds = kinds

    def find_class(self, module: str, name: str) -> Any:
        kind = f"{module}.{name}"
        if kind not in self._kinds:
            raise NamesCode(kind)
        return _record_of(kind)

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()  # type: ignore[attr-defined]
        self._set(self.stack[-1], [key, value])  # type: ignore[attr-defined]

    def load_setitems(self) -> None:
        items = self.pop_mark()  # type: ignore[attr-defined]
        self._set(self.stack[-1], items)  # type: ignore[attr-defined]

    def _set(self, target: Any, items: list[Any]) -> None:
        for key, value in zip(items[::2], items[1::2]):
            if not isinstance(key, (str, Record)):  # the hash of a nested tuple can take forever
                raise TypeError(f"a dictionary has the key {type(key).__name__}")
            target[key] = value

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems  # type: ignore[assignment]


def read_pickle(data: bytes, kinds: Collection[str], file: Path) -> Any:
    """Return what the pickle ``data``, read from ``file``, holds: plain values and :class:`Record`.

    Args:
        kinds: ``module.name`` of every class and function that it may name. None of them is imported or called.

    Raises:
        NamesCode: it names another class or function.
        Untrusted: it is damaged, or holds more than a pickle of these kinds needs.
    """
    try:
        return _Unpickler(data, kinds).load()
    except NamesCode as e:
        raise NamesCode(
            f"{file} asks for {str(e)[:200]!r}, which no checkpoint needs, and which could run code; nothing was run. "
            "Do not use these files, and ask whoever made them"
        ) from None
    except Exception as e:  # what fails on damaged bytes is open
        raise Untrusted(f"{file} cannot be read ({type(e).__name__}: {str(e)[:200]})") from None
