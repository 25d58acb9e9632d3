"""What a terminal can show: its width, its colours, and text that fits it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from typing import TextIO

from rich.cells import cell_len

CLEAR = "\r\033[J"  # from the start of the line to the end of the screen
_CUT, _WRAP, _UP = "\033[?7l", "\033[?7h", "\033[A"  # what is beyond the last column; and a line up
_CODES = {"bold": 1, "dim": 2, "red": 31, "green": 32, "yellow": 33, "cyan": 36}
_STYLE = re.compile(r"\033\[\d*m")


def is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def columns_of(stream: TextIO) -> int:
    """Return the present width of the terminal that ``stream`` writes to; 80 if it does not say."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def paint(text: str, style: str, colored: bool) -> str:
    """Return ``text`` in a style: bold, dim, red, green, yellow or cyan; "" is none."""
    return f"\033[{_CODES[style]}m{text}\033[0m" if colored and style else text


def length(text: str) -> int:
    """Return the number of columns of ``text``, without its styles. Chinese characters have two."""
    return cell_len(_STYLE.sub("", text))


def below(status: str) -> str:
    """Return the codes that draw ``status`` one line below the cursor. The cursor goes back to the start of its own,
    empty line, so that a line of another process stands alone."""
    return f"{CLEAR}\n{_CUT}{status}{_WRAP}{_UP}\r"


def joined(fields: Iterable[str], width: int) -> str:
    """Return the fields, two spaces apart; those that have no room in ``width`` columns are left out. The first fields
    are the most important ones."""
    line = ""
    for field in fields:
        longer = f"{line}  {field}" if line else field
        if length(longer) <= width:
            line = longer
    return line


# A command line of titanlite, or of the Python that it runs in; its words, of which quoted ones may have spaces.
_COMMAND = re.compile(r"(\w+=\S+ )*(\S*/)?(titanlite|run_train\.sh|python[\d.]*) ")
_WORD = re.compile(r" *(?:'[^']*'|[^ '])+")


def fitted(text: str, width: int) -> str:
    """Break the lines of ``text`` between words, so that they have at most ``width`` columns. A line goes on below the
    value of its ``name  value``, else four columns further in; a command goes on after a backslash, so that it can be
    pasted. A longer word, such as a path, stays whole; so does a line with styles, which is made to fit."""
    return "\n".join(_fitted(line, width) for line in text.split("\n"))


def _fitted(line: str, width: int) -> str:
    if length(line) <= width or "\033" in line:
        return line
    named = re.match(r" *(?:\S+ )*\S+ {2,}", line)
    inner = len(line) - len(line.lstrip(" ")) + 4
    first = line[: inner - 4]
    if named and named.end() <= width // 2:
        inner, first = named.end(), named[0]
    rest = line[len(first) :]
    is_command = _COMMAND.match(rest)
    words, mark = (_WORD.findall(rest), " \\") if is_command else (re.findall(r" *[^ ]+", rest), "")
    lines, current = list[str](), first
    for word in words:
        if current.strip(" ") and current != first and length(current + word + mark) > width:
            lines.append(current + mark)
            current, word = " " * inner, word.lstrip(" ")
        current += word
    return "\n".join([*lines, current])
