"""The rule by which long texts are cut into pieces: the same for every source."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import IO

# Longer texts are cut into pieces of at least this size. So one big file gives many documents to shuffle and deal, and
# tokenizing takes memory for a piece, not for a whole document.
PIECE_BYTES = 64 * 1024
# Where a line ends later than this after PIECE_BYTES, the cut is inside the line.
_LONGEST_REST = PIECE_BYTES

# Between two words: before a space, or before punctuation of Chinese and Japanese. Tokenizers that split text into
# words split there too, so that the pieces have the tokens of the whole text.
_BETWEEN_WORDS = re.compile(rb"(?<=[^ \t\r\n])(?= |\xe3\x80[\x80-\x82]|\xef\xbc\x8c)")


def rest_of_piece(stream: IO[bytes]) -> tuple[bytes, bytes]:
    """Return the end of a piece whose first PIECE_BYTES bytes have been read from ``stream``, and what was read beyond.

    The piece ends with the line; if that is too long, between two words; else between two characters. A piece that is
    cut again gives itself.
    """
    line = stream.readline(_LONGEST_REST)
    if len(line) < _LONGEST_REST or line.endswith(b"\n"):
        return line, b""
    match = _BETWEEN_WORDS.search(line)
    end = match.start() if match else 0
    while match is None and end < 3 and 0x80 <= line[end] < 0xC0:  # inside a character of UTF-8
        end += 1
    return line[:end], line[end:]


def pieces(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield the pieces of the bytes of ``stream``, which together are these bytes."""
    beyond = b""
    while head := beyond + stream.read(PIECE_BYTES - len(beyond)):
        rest, beyond = rest_of_piece(stream) if len(head) == PIECE_BYTES else (b"", b"")
        yield head + rest


def cut(text: str) -> Iterator[str]:
    """Yield the pieces of ``text``; an empty text has one."""
    if len(text) <= PIECE_BYTES // 4:  # a character has at most 4 bytes
        yield text
        return
    begin = 0
    while begin < len(text):  # no copy of the whole text: a piece depends on at most this many characters
        window = text[begin : begin + PIECE_BYTES + _LONGEST_REST].encode("utf-8", "surrogatepass")
        piece = next(pieces(io.BytesIO(window))).decode("utf-8", "surrogatepass")
        begin += len(piece)
        yield piece
