"""Where the documents of a file are, as (begin, end) in bytes, and reading them."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from titanlite.data.cut import PIECE_BYTES, rest_of_piece
from titanlite.data.files import open_file, unreadable
from titanlite.data.records import LONGEST_RECORD, is_blank
from titanlite.errors import ConfigError

_BLOCK = 1 << 24
_BETWEEN_ELEMENTS = re.compile(r"[ \t\r\n]*,?[ \t\r\n]*")
_ENDS = 4096  # the bytes at each end of a file in which the brackets of an array are looked for


def piece_spans(file: Path) -> list[tuple[int, int]]:
    """Return the (begin, end) of each piece of a text file (:mod:`titanlite.data.cut`); none for an empty file."""
    try:
        size = file.stat().st_size
        if size <= PIECE_BYTES:
            return [(0, size)] if size else []
        begins = [0]
        with file.open("rb") as stream:
            while (end := begins[-1] + PIECE_BYTES) < size:
                stream.seek(end)
                begins.append(end + len(rest_of_piece(stream)[0]))
    except OSError as error:
        raise unreadable(file, error) from error
    return [(begin, end) for begin, end in zip(begins, [*begins[1:], size]) if end > begin]


def json_spans(file: Path) -> NDArray[np.int64]:
    """Return int64 [documents, 2]: the elements of the JSON array that the file is, or else its lines."""
    elements = array_spans(file)
    return _line_spans(file) if elements is None else elements


def array_spans(file: Path) -> NDArray[np.int64] | None:
    """Return int64 [elements, 2] for a file that is one JSON array; None for another file.

    What follows an element that is no JSON is one last element, which cannot be read.

    Raises:
        ConfigError: the file cannot be read, or is too large to find its elements.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(_ENDS)
            stream.seek(max(0, size - _ENDS))
            if not (_begins_array(head) and stream.read(_ENDS).rstrip().endswith(b"]")):
                return None
            if size > LONGEST_RECORD:
                raise _too_large(file)
            stream.seek(0)
            content = stream.read()
    except OSError as error:
        raise unreadable(file, error) from error
    return element_spans(content)


def compressed_array(file: Path) -> bytes | None:
    """Return the bytes of a compressed file that is one JSON array; None for another file.

    Raises:
        ConfigError: what begins as an array is too large to find its elements.
    """
    with open_file(file) as stream:
        head = stream.read(_ENDS)
        if not _begins_array(head):
            return None
        content = head + stream.read(LONGEST_RECORD + 1 - len(head))
    if len(content) > LONGEST_RECORD:
        raise _too_large(file)
    return content if content.rstrip().endswith(b"]") else None


def _begins_array(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _too_large(file: Path) -> ConfigError:
    return ConfigError(
        f"{file} is a JSON array of more than {LONGEST_RECORD >> 20} MiB; write one object per line, for "
        "example with: jq -c '.[]'"
    )


def element_spans(content: bytes | None) -> NDArray[np.int64] | None:
    """Return int64 [elements, 2] for the bytes of a JSON array; None for other lines that end in a bracket."""
    if content is None:
        return None
    text = content.decode("latin-1")  # one character per byte, so that places are bytes; JSON's structure is ASCII
    decoder, at = json.JSONDecoder(), text.index("[") + 1
    spans: list[tuple[int, int]] = []
    while True:
        between = _BETWEEN_ELEMENTS.match(text, at)
        at = between.end() if between else at
        if text.startswith("]", at):
            whole = is_blank(text[at + 1 :].encode("latin-1").replace(b"\n", b" "))
            return np.array(spans, dtype=np.int64).reshape(-1, 2) if whole else None
        try:
            end = decoder.raw_decode(text, at)[1]
        except (ValueError, RecursionError):
            return np.array([*spans, (at, len(text))], dtype=np.int64)
        spans.append((at, end))
        at = end


def _line_spans(file: Path) -> NDArray[np.int64]:
    """Return int64 [lines, 2]: the lines that can hold an object (``{}`` is two bytes) and are not blank."""
    ends: list[NDArray[np.int64]] = []
    suspects: list[NDArray[np.int64]] = []  # lines whose first byte can begin a blank one
    size, begins_line = 0, True
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                data = np.frombuffer(block, dtype=np.uint8)
                newlines = np.flatnonzero(data == ord("\n")).astype(np.int64)
                ends.append(newlines + size)
                begins = np.concatenate([np.zeros(int(begins_line), np.int64), newlines + 1])
                begins = begins[begins < len(data)]
                suspects.append(begins[(data[begins] <= ord(" ")) | (data[begins] == 0xEF)] + size)
                size += len(block)
                begins_line = block.endswith(b"\n")
            last = np.concatenate([*ends, np.array([size], dtype=np.int64)])
            spans = np.stack([np.concatenate([[0], last[:-1] + 1]), last], axis=1)
            spans = spans[spans[:, 1] - spans[:, 0] >= 2]
            candidates = np.flatnonzero(np.isin(spans[:, 0], np.concatenate([*suspects, np.zeros(0, np.int64)])))
            if not len(candidates):
                return spans
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as view:
                blank = [i for i in candidates if is_blank(view, int(spans[i, 0]), int(spans[i, 1]))]
    except OSError as error:
        raise unreadable(file, error) from error
    return np.delete(spans, blank, axis=0)


def read_span(file: Path, begin: int, end: int) -> bytes:
    """Return the bytes of a document, or its first LONGEST_RECORD + 1 bytes."""
    try:
        with file.open("rb") as stream:
            stream.seek(begin)
            return stream.read(min(end - begin, LONGEST_RECORD + 1))
    except OSError as error:
        raise unreadable(file, error) from error


def line_at(file: Path, offset: int) -> int:
    """Return the number, from 1, of the line that has the byte ``offset``."""
    lines = 1
    try:
        with file.open("rb") as stream:
            while offset > 0 and (block := stream.read(min(offset, _BLOCK))):
                lines += block.count(b"\n")
                offset -= len(block)
    except OSError as error:
        raise unreadable(file, error) from error
    return lines
