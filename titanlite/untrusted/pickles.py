"""Read pickles as data: no class or function that they name is imported or called."""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from titanlite.errors import ConfigError
from titanlite.untrusted.files import Untrusted


class NamesCode(ConfigError):
    """A pickle names code that does not belong into it. Nothing of the file was run."""


class Record:
    """An object as a pickle describes it, as data: the ``kind`` (module and name), the arguments and the state."""

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
        raise Untrusted(file, f"cannot be read ({type(e).__name__}: {str(e)[:200]})") from None
