"""Read pickles as data: no class or function that they name is imported or called.

Python's reader in C allocates whatever length a file states, and hashes whatever stands as a key. Its reader in Python
makes several calls for each of the operations, of which the pickle of a large checkpoint has a hundred millions. Here,
one loop does the frequent ones, and a regular expression reads many objects at once where it can.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Collection, Mapping
from functools import cache
from pathlib import Path
from struct import Struct
from typing import Any, ClassVar

import numpy as np

from titanlite.errors import ConfigError
from titanlite.untrusted.files import Untrusted
from titanlite.untrusted.rows import OBJECT, Kept, Rows


class NamesCode(ConfigError):
    """A pickle names code that does not belong into it. Nothing of the file was run."""


class Record:
    """An object as a pickle describes it, as data: the ``kind`` (module and name), the arguments and the state."""

    __slots__ = ("args", "state")
    kind: ClassVar[str] = ""
    args: tuple[Any, ...]
    state: Any


@cache
def _record_of(kind: str) -> type[Record]:
    return type("Record", (Record,), {"kind": kind, "__slots__": ()})


def read_pickle(
    data: bytes,
    kinds: Collection[str],
    file: Path,
    *,
    values: Mapping[str, Callable[..., Any]] | None = None,
    states: Mapping[str, Kept] | None = None,
) -> Any:
    """Return what the pickle ``data``, read from ``file``, holds: plain values and :class:`Record`.

    Args:
        kinds: ``module.name`` of every class and function that it may name. None of them is imported or called.
        values: kind -> a function of the arguments of such an object, which returns what stands in its place.
        states: kind -> what the record of such an object keeps of its state.

    Raises:
        NamesCode: it names another class or function.
        Untrusted: it is damaged, holds more than a pickle of these kinds needs, or a given function raised it.
    """
    try:
        return _Reader(data, kinds, values or {}, states or {}).load()
    except NamesCode as e:
        raise NamesCode(
            f"{file} asks for {str(e)[:200]!r}, which no checkpoint needs, and which could run code; nothing was run. "
            "Do not use these files, and ask whoever made them"
        ) from None
    except Untrusted:  # of the functions that are given
        raise
    except Exception as e:  # what fails on damaged bytes is open
        raise Untrusted(file, f"cannot be read ({type(e).__name__}: {str(e)[:200]})") from None


# The operations that occur for each chunk of a checkpoint, in the loop.
_BINGET, _LONG_BINGET, _MEMOIZE = pickle.BINGET[0], pickle.LONG_BINGET[0], pickle.MEMOIZE[0]
_BININT, _BININT1, _BININT2, _LONG1 = pickle.BININT[0], pickle.BININT1[0], pickle.BININT2[0], pickle.LONG1[0]
_EMPTY_TUPLE, _TUPLE1, _TUPLE2, _MARK = pickle.EMPTY_TUPLE[0], pickle.TUPLE1[0], pickle.TUPLE2[0], pickle.MARK[0]
_REDUCE, _SETITEMS, _BUILD, _STOP = pickle.REDUCE[0], pickle.SETITEMS[0], pickle.BUILD[0], pickle.STOP[0]


_int16, _int32, _uint32 = (Struct(code).unpack_from for code in ("<H", "<i", "<I"))
_ALWAYS_KEPT = 256  # what BINGET can ask for
_BLOCK = 1 << 22  # bytes


class _Reader:
    """Reads one pickle. A slice beyond its end is short; then no operation follows, which raises IndexError.

    Every list, dictionary, record and mark takes a byte of the file or more, and no operation recurses, so memory and
    time are linear in the bytes. Only texts and records are keys: the hash of a nested tuple can take forever.
    """

    def __init__(
        self,
        data: bytes,
        kinds: Collection[str],
        values: Mapping[str, Callable[..., Any]],
        states: Mapping[str, Kept],
    ) -> None:
        self._data, self._kinds, self._values, self._states = data, kinds, values, states
        self._stack: list[Any] = []
        self._outer: list[list[Any]] = []  # the stacks below each mark
        self._memo: dict[int, Any] = {}
        self._puts = False
        self._at = 0

    def load(self) -> Any:
        data, memo, outer, states = self._data, self._memo, self._outer, self._states
        fetched, stack, at, count = _fetched(data), self._stack, 0, 0
        rows = Rows(data, memo, fetched, self._values)
        while True:
            operation = data[at]
            at += 1
            if operation == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif operation == _MEMOIZE:
                if fetched[count]:
                    memo[count] = stack[-1]
                count += 1
            elif operation == _LONG_BINGET:
                stack.append(memo[_uint32(data, at)[0]])
                at += 4
            elif operation == _BININT1:
                stack.append(data[at])
                at += 1
            elif operation == _BININT2:
                stack.append(_int16(data, at)[0])
                at += 2
            elif operation == _BININT:
                stack.append(_int32(data, at)[0])
                at += 4
            elif operation == _EMPTY_TUPLE:
                stack.append(())
                if data[at : at + 5] == OBJECT:  # so begins one with attributes
                    _new(stack)
                    stack.append({})
                    for made in stack[-2:]:
                        if fetched[count]:
                            memo[count] = made
                        count += 1
                    outer.append(stack)
                    stack = []
                    at += 5
            elif operation == _SETITEMS:
                items, stack = stack, outer.pop()
                _set_items(stack[-1], items)
            elif operation == _BUILD:
                if _build(stack, states, rows) and count:
                    at, count = rows.read(stack, at, count)
            elif operation == _TUPLE2:
                second = stack.pop()
                stack[-1] = stack[-1], second
            elif operation == _TUPLE1:
                stack[-1] = (stack[-1],)
            elif operation == _REDUCE:
                _reduce(stack)
            elif operation == _LONG1:
                stack.append(int.from_bytes(data[at + 1 : at + 1 + data[at]], "little", signed=True))
                at += 1 + data[at]
            elif operation == _MARK:
                outer.append(stack)
                stack = []
            elif operation == _STOP:
                if count and self._puts:  # what MEMOIZE numbers would depend on the numbers that are put
                    raise ValueError("it numbers its objects in two ways")
                return stack.pop()
            elif operation in _RARE:
                self._stack, self._at = stack, at
                _RARE[operation](self)
                stack, at = self._stack, self._at
            else:
                raise ValueError(f"the operation {operation:#x} is none that a checkpoint needs")

    # ---- the operations that occur seldom: each takes its bytes at `_at`

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += count
        return taken

    def _take_number(self, count: int) -> int:
        return int.from_bytes(self._take(count), "little")

    def _take_line(self) -> str:
        return self._take(self._data.index(b"\n", self._at) + 1 - self._at)[:-1].decode()

    def _pop_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._outer.pop()
        return items

    def _protocol(self) -> None:
        if self._take_number(1) > 5:
            raise ValueError("it is of an unknown protocol")

    def _frame(self) -> None:
        if self._take_number(8) > len(self._data) - self._at:
            raise ValueError("it ends early")

    def _text(self, bytes_of_length: int) -> None:
        self._stack.append(str(self._take(self._take_number(bytes_of_length)), "utf-8", "surrogatepass"))

    def _put(self, bytes_of_number: int) -> None:
        self._puts = True
        self._memo[self._take_number(bytes_of_number)] = self._stack[-1]

    def _tuple(self) -> None:
        items = self._pop_mark()
        self._stack.append(tuple(items))

    def _tuple3(self) -> None:
        self._stack[-3:] = [(self._stack[-3], self._stack[-2], self._stack[-1])]

    def _append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("something is appended to what is no list")
        target += items

    def _set_item(self) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        _set_items(self._stack[-1], [key, value])

    def _global(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            raise TypeError("a name is no text")
        kind = f"{module}.{name}"
        if kind not in self._kinds:
            raise NamesCode(kind)
        self._stack.append(self._values.get(kind) or _record_of(kind))

    def _stack_global(self) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self._global(module, name)


_RARE: dict[int, Callable[[_Reader], Any]] = {
    pickle.PROTO[0]: _Reader._protocol,
    pickle.FRAME[0]: _Reader._frame,
    pickle.NONE[0]: lambda reader: reader._stack.append(None),
    pickle.NEWTRUE[0]: lambda reader: reader._stack.append(True),
    pickle.NEWFALSE[0]: lambda reader: reader._stack.append(False),
    pickle.SHORT_BINUNICODE[0]: lambda reader: reader._text(1),
    pickle.BINUNICODE[0]: lambda reader: reader._text(4),
    pickle.BINPUT[0]: lambda reader: reader._put(1),
    pickle.LONG_BINPUT[0]: lambda reader: reader._put(4),
    pickle.TUPLE[0]: _Reader._tuple,
    pickle.TUPLE3[0]: _Reader._tuple3,
    pickle.EMPTY_LIST[0]: lambda reader: reader._stack.append([]),
    pickle.APPEND[0]: lambda reader: reader._append([reader._stack.pop()]),
    pickle.APPENDS[0]: lambda reader: reader._append(reader._pop_mark()),
    pickle.EMPTY_DICT[0]: lambda reader: reader._stack.append({}),
    pickle.SETITEM[0]: _Reader._set_item,
    pickle.GLOBAL[0]: lambda reader: reader._global(reader._take_line(), reader._take_line()),
    pickle.STACK_GLOBAL[0]: _Reader._stack_global,
    pickle.NEWOBJ[0]: lambda reader: _new(reader._stack),
    pickle.BINPERSID[0]: lambda reader: reader._stack[-1],  # what a persistent name stands for is the name
}


def _fetched(data: bytes) -> bytes:
    """Return a byte for each object that MEMOIZE numbers: 0 if no LONG_BINGET asks for it, so that it need not be kept.

    The bytes of such an operation can also be a part of others. Then an object is kept for nothing.
    """
    count = data.count(pickle.MEMOIZE)
    if count <= _ALWAYS_KEPT:
        return b"\1" * (count + 1)
    marks = np.zeros(count + 1, dtype=np.uint8)
    marks[:_ALWAYS_KEPT] = 1
    every_byte = np.frombuffer(data, dtype=np.uint8)
    for begin in range(0, len(data), _BLOCK):
        block = every_byte[begin : begin + _BLOCK + 4]
        places = np.flatnonzero(block[:-4] == _LONG_BINGET)
        numbers = np.stack([block[places + 1 + i] for i in range(4)], axis=1).view("<u4")[:, 0]
        marks[numbers[numbers < count]] = 1
    return marks.tobytes()


def _new(stack: list[Any]) -> Record:
    """Put a record in the place of a class and the arguments."""
    args, kind = stack.pop(), stack[-1]
    if type(kind) is not type or type(args) is not tuple:
        raise TypeError("an object is made of no class")
    record: Record = kind()
    record.args, record.state = args, None
    stack[-1] = record
    return record


def _reduce(stack: list[Any]) -> None:
    """Put what is made of a class or function and the arguments in their place."""
    if type(stack[-2]) is type:
        _new(stack)
        return
    args = stack.pop()
    if type(args) is not tuple:
        raise TypeError("arguments are no tuple")
    stack[-1] = stack[-1](*args)  # one of `values`: nothing else that can be on the stack is callable


def _build(stack: list[Any], states: Mapping[str, Kept], rows: Rows) -> bool:
    """Give a record its state. Return whether rows may follow."""
    state, record = stack.pop(), stack[-1]
    if not isinstance(record, Record):
        raise TypeError("a state is that of no object")
    kept = states.get(record.kind)
    if kept is None:
        record.state = state
        return False
    attributes = state if type(state) is dict else {}
    record.state = kept.keep(*map(attributes.get, kept.fields))
    if kept.is_row:
        rows.learn(type(record), kept, tuple(attributes))
    return kept.is_row


def _set_items(target: Any, items: list[Any]) -> None:
    """Set the items of a dictionary: keys and values in turn."""
    if type(target) is not dict or len(items) % 2:
        raise TypeError("items are set of what is no dictionary")
    keys = items[::2]
    for key in keys:
        if type(key) is not str and not isinstance(key, Record):
            raise TypeError(f"a dictionary has the key {type(key).__name__}")
    target.update(zip(keys, items[1::2]))
