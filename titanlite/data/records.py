"""Take the text out of a record: a line of JSON lines, an element of a JSON array, a row of a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from mmap import mmap
from typing import Any

# A longer record is not read: a line end that is missing in a huge file must not fill the memory.
LONGEST_RECORD = 256 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_BLANK = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\r\f\v]*\n?")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SHOWN_FIELDS = 12


class Corrupt(Exception):
    """A document that cannot be read.

    Args:
        problem: what is wrong, for the message.
        kind: the same for documents with the same fault, whatever their content.
        offset: the place of the fault in the document, in bytes.
    """

    def __init__(self, problem: str, kind: str, offset: int = 0) -> None:
        super().__init__(problem)
        self.kind, self.offset = kind, offset


def is_blank(data: bytes | mmap, begin: int = 0, end: int | None = None) -> bool:
    """Return True if the bytes from ``begin`` to ``end`` are blanks, or a byte order mark and blanks."""
    end = len(data) if end is None else end
    match = _BLANK.match(data, begin, end)
    return match is not None and match.end() == end


def decode_text(data: bytes) -> str:
    """Return UTF-8 text without its byte order mark.

    Raises:
        Corrupt: it is not UTF-8.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Corrupt(f"invalid UTF-8 ({error.reason})", "utf-8", error.start) from None


def text_of_line(line: bytes, field: str) -> str:
    """Return the string ``field`` of the JSON object in ``line``.

    Raises:
        Corrupt: there is none.
    """
    return text_of_record(record_of_line(line), field)


def record_of_line(line: bytes) -> dict[str, Any]:
    """Return the JSON object in ``line``.

    Raises:
        Corrupt: there is none.
    """
    if len(line) > LONGEST_RECORD:
        raise Corrupt(f"a record of more than {LONGEST_RECORD >> 20} MiB; cut it into several", "size")
    try:
        record = json.loads(decode_text(line))
    except ValueError as error:
        raise Corrupt(f"not JSON ({error}); every line must be one object", "json") from None
    except RecursionError:
        raise Corrupt("not usable JSON (nested too deeply)", "json") from None
    if not isinstance(record, dict):
        raise Corrupt(f"a JSON {type(record).__name__}, not an object; every line must be one object", "object")
    return record


def text_of_record(record: Mapping[str, object], field: str, option: str | None = "data.text_field") -> str:
    """Return the string ``field`` of ``record``, which has no half of a surrogate pair.

    Args:
        option: the option that names the field, for messages; None: the format of the data set does.

    Raises:
        Corrupt: there is none.
    """
    if field not in record:
        raise Corrupt(no_field(field, record, option), "no field")
    text = record[field]
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        named = f"; {option} names it" if option else ""
        raise Corrupt(f'the field "{field}" is not a string ({kind}){named}', "not a string")
    if has_surrogate(text):
        problem = f'the field "{field}" has half of a surrogate pair, which is no character'
        raise Corrupt(problem, "surrogate")
    return text


def has_surrogate(text: str) -> bool:
    """Return True if ``text``, which can be long and is not encoded, has half of a surrogate pair."""
    return _SURROGATE.search(text) is not None


def no_field(field: str, fields: Iterable[str], option: str | None = "data.text_field") -> str:
    """Return the message for a record, or a table, without ``field``; see :func:`text_of_record`."""
    names = [name if len(name) <= 40 else f"{name[:40]}..." for name in fields]
    more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
    has = ", ".join(names[:_SHOWN_FIELDS]) or "none"
    fix = f"; name the right one with {option}" if option else ""
    return f'no field "{field}" (it has: {has}{more}){fix}'
