"""Rows of a pickle: objects of a few kinds, one after the other, each with the same attributes.

The metadata of a large checkpoint are millions of them. Where the next ones are written as the one before, a regular
expression reads many at once, in a fraction of the time of a loop over their operations. What it does not match, the
loop reads: both read the same bytes as the same values.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, NamedTuple

_LEAST, _MOST = 1 << 9, 1 << 16  # bytes that are looked at at once
_FEW = 8  # numbers of the memo; a row of DCP's takes as many
_MOST_DECODED = 1 << 16

# Each value is of one operation, or of those that call a function with a tuple of whole numbers.
_INT = rb"(?:K.|M..|J.{4}" + b"".join(rb"|\x8a\x%02x.{%d}" % (n, n) for n in range(1, 9)) + rb")"
_TUPLE = rb"(?:%b(?:%b(?:\x86|%b\x87)|\x85)|\(%b{4,64}t)" % ((_INT,) * 4)
_TEXT = rb"\x8c.[ -~]{0,255}\x94"  # its first byte must be its length, which is checked later
_OTHER = rb"N|h.|j.{4}"
_ENDS_TUPLE = pickle.MEMOIZE + pickle.TUPLE1 + pickle.MEMOIZE + pickle.REDUCE + pickle.MEMOIZE

OBJECT = pickle.NEWOBJ + pickle.MEMOIZE + pickle.EMPTY_DICT + pickle.MEMOIZE + pickle.MARK
_BEGINS = re.escape(pickle.EMPTY_TUPLE + OBJECT)
_ENDS = re.escape(pickle.SETITEMS + pickle.BUILD)
_REST = rb"|(.+)"


class Kept(NamedTuple):
    """The part of the state that is kept of a kind of object.

    Attributes:
        fields: the attributes that are looked at; those of a row in the order in which they are written.
        keep: is called with their values, None for one that is missing, and returns the state that the record keeps.
        is_row: many such objects follow each other.
    """

    fields: tuple[str, ...]
    keep: Callable[..., Any]
    is_row: bool = False


_Row = tuple[int, int, type[Any], Callable[..., Any]]  # the first group of values and the one behind, the kind, `keep`


class Rows:
    """Reads rows of the kinds that were learned.

    Args:
        memo: number -> object, of those that may be asked for again.
        fetched: a byte for each number, 0 if its object is not asked for again. Rows put nothing into the memo.
        functions: what may be called with a tuple.
    """

    def __init__(
        self, data: bytes, memo: Mapping[int, Any], fetched: bytes, functions: Mapping[str, Callable[..., Any]]
    ) -> None:
        self._data, self._memo, self._fetched = data, memo, fetched
        self._functions = functions.values()
        self._known: set[type[Any]] = set()
        self._rows: list[_Row] = []
        self._patterns: list[bytes] = []
        self._pattern = re.compile(_REST[1:], re.DOTALL)
        self._window, self._limit = _LEAST, -1
        self._decoded = _Decoded(memo)

    def learn(self, kind: type[Any], kept: Kept, written: tuple[str, ...]) -> None:
        """Learn how the objects of a kind are written, after the first: by what names them and their attributes."""
        if kind in self._known:
            return
        self._known.add(kind)
        gets: dict[Any, bytes] = {}
        for number, value in self._memo.items():
            if type(value) is str or callable(value):
                gets.setdefault(value, _get(number))
        if written != kept.fields[: len(written)] or not {kind, *written} <= gets.keys():
            return
        called = b"|".join(re.escape(gets[function]) for function in self._functions if function in gets)
        calls = rb"(?:%b)%b%b|" % (called, _TUPLE, re.escape(_ENDS_TUPLE)) if called else b""
        value = rb"(%b%b|%b|%b)" % (calls, _INT, _TEXT, _OTHER)
        attributes = b"".join(re.escape(gets[name]) + value for name in written)
        self._patterns.append(re.escape(gets[kind]) + _BEGINS + attributes + _ENDS)
        self._pattern = re.compile(b"|".join(self._patterns) + _REST, re.DOTALL)
        first = self._rows[-1][1] if self._rows else 0
        self._rows.append((first, first + len(written), kind, kept.keep))

    def read(self, stack: list[Any], at: int, count: int) -> tuple[int, int]:
        """Put the rows that begin at the byte ``at`` on the stack. Return the byte behind them, and what ``count`` is
        there: the number of the next object of the memo."""
        if self._limit < count:
            self._limit = self._fetched.find(b"\1", count) % (len(self._fetched) + 1)
        while self._rows and self._limit - count >= _FEW:
            end = min(at + self._window, len(self._data))
            matches = self._pattern.findall(self._data, at, end)
            rest = matches.pop()[-1] if matches and matches[-1][-1] else b""
            taken, count = self._take(matches, stack, count)
            if taken < len(matches):
                at = next(islice(self._pattern.finditer(self._data, at, end), taken, None)).start()
            else:
                at = end - len(rest)
            if taken < len(matches) or not matches:
                self._window = _LEAST  # so that what is not taken is not looked at again and again
                break
            self._window = min(2 * self._window, _MOST)
        return at, count

    def _take(self, matches: list[Any], stack: list[Any], count: int) -> tuple[int, int]:
        """Put rows on the stack, up to one that has an object that is asked for again, or a text of another length than
        it says. Return how many, and the number of the next object."""
        rows, decoded = self._rows, self._decoded
        if len(decoded) > _MOST_DECODED:
            decoded.clear()
        for taken, groups in enumerate(matches):
            for row in rows:
                if groups[row[0]]:
                    break
            first, end, kind, keep = row
            values, behind = [], count + 2
            try:
                for encoded in groups[first:end]:
                    value, numbers = decoded[encoded]
                    values.append(value)
                    behind += numbers
            except _AnotherLength:
                return taken, count
            if behind > self._limit:
                return taken, count
            record = kind()
            record.args, record.state = (), keep(*values)
            stack.append(record)
            count = behind
        return len(matches), count


class _AnotherLength(ValueError):
    """A text has another length than it says: it holds what looks like its end."""


class _Decoded(dict[bytes, tuple[Any, int]]):
    """The bytes of a value -> the value, and how many objects of the memo it has."""

    def __init__(self, memo: Mapping[int, Any]) -> None:
        super().__init__()
        self._memo = memo

    def __missing__(self, encoded: bytes) -> tuple[Any, int]:
        self[encoded] = decoded = self._decode(encoded)
        return decoded

    def _decode(self, encoded: bytes) -> tuple[Any, int]:
        operation = encoded[:1]
        if operation == pickle.NONE:
            return None, 0
        if operation == pickle.SHORT_BINUNICODE:
            text = encoded[2:-1].decode("ascii")
            if len(text) != encoded[1]:
                raise _AnotherLength
            return text, 1
        if operation not in (pickle.BINGET, pickle.LONG_BINGET):
            return _ints(encoded)[0], 0
        end = 2 if operation == pickle.BINGET else 5
        value = self._memo[int.from_bytes(encoded[1:end], "little")]
        if len(encoded) == end:
            return value, 0
        return value(tuple(_ints(encoded[end : -len(_ENDS_TUPLE)]))), 3


def _get(number: int) -> bytes:
    """Return the operation that asks for an object of the memo."""
    return pickle.BINGET + bytes((number,)) if number < 256 else pickle.LONG_BINGET + number.to_bytes(4, "little")


def _ints(encoded: bytes) -> list[int]:
    """Return the whole numbers of a row of operations, without those that make a tuple of them."""
    numbers, at = [], 0
    while at < len(encoded):
        operation = encoded[at : at + 1]
        at += 1
        if operation == pickle.BININT1:
            numbers.append(encoded[at])
            at += 1
        elif operation == pickle.BININT2:
            numbers.append(int.from_bytes(encoded[at : at + 2], "little"))
            at += 2
        elif operation == pickle.BININT:
            numbers.append(int.from_bytes(encoded[at : at + 4], "little", signed=True))
            at += 4
        elif operation == pickle.LONG1:
            numbers.append(int.from_bytes(encoded[at + 1 : at + 1 + encoded[at]], "little", signed=True))
            at += 1 + encoded[at]
    return numbers
