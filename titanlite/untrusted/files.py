"""Read files of a folder that somebody else may have made: regular files of that folder, of a bounded size."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, BinaryIO, Literal, Union, get_args, get_origin

from titanlite.errors import ConfigError

MOST_JSON = 1 << 26  # bytes; the largest published index has 20 MB


class Untrusted(ConfigError):
    """A file holds what it must not, or not what it must; ``problem`` says that, and what to do."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.problem = problem


def contained(folder: Path, name: str) -> Path:
    """Return the path of the file ``name`` of ``folder``, which need not exist.

    A link is followed only to a file of the same folder. In the Hub's cache it may lead to a file of the same
    repository: there, ``snapshots/<revision>/`` has links to ``blobs/``.

    Raises:
        Untrusted: the name, or a link, leads out of the folder.
    """
    if not name.isprintable() or name in ("", ".") or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise Untrusted(folder, f"names the file {name[:200]!r}, which is not in that folder; download it again")
    file, border = folder / name, _border(Path(os.path.realpath(folder)))
    target = Path(os.path.realpath(file))
    if not target.is_relative_to(border):
        raise Untrusted(file, f"is a link to {target}, outside of {border}; put the file itself there")
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


def read_bytes(file: Path, most: int) -> bytes:
    """Return the content of a regular file of at most ``most`` bytes.

    Raises:
        OSError: it cannot be read.
        Untrusted: it is larger.
    """
    with open_file(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > most:
            raise Untrusted(file, f"has more than {most:,} bytes, the most that are read of it; download it again")
        return stream.read(size)  # not `most`: room is made for as many at once


def read_json(file: Path, most: int = MOST_JSON) -> dict[str, Any]:
    """Return the object in a JSON file; see :func:`json_object`.

    Raises:
        Untrusted: it cannot be read, has more than ``most`` bytes, or holds something else.
    """
    try:
        return json_object(read_bytes(file, most), file)
    except OSError as e:
        raise Untrusted(file, f"cannot be read ({e.strerror or e}); correct the path or its permissions") from None


def json_object(text: bytes, file: Path) -> dict[str, Any]:
    """Return the object that ``text``, read from ``file``, holds as JSON; its strings can be written as UTF-8.

    Raises:
        Untrusted: it holds something else.
    """
    try:
        content = json.loads(text.decode("utf-8"))
        if b"\\u" in text:  # an escape may be half of a character
            json.dumps(content, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as e:
        reason = str(e).encode("utf-8", "backslashreplace").decode()[:200]
        raise Untrusted(file, f"is not JSON ({reason}); repair it or download it again") from None
    if not isinstance(content, dict):
        raise Untrusted(file, "holds no JSON object; repair it or download it again")
    return content


def is_of(value: Any, kind: Any) -> bool:
    """Return True if ``value``, read from JSON, is of the type ``kind``, as a field of a dataclass declares it. A whole
    number is at least 0 and has 64 bits at most."""
    if get_origin(kind) in (Union, UnionType):
        return any(is_of(value, part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if kind is int:
        return type(value) is int and 0 <= value < 1 << 64
    if kind is float:
        return is_of(value, int) or (type(value) is float and math.isfinite(value))
    if get_origin(kind) is list:
        return isinstance(value, list) and all(is_of(item, get_args(kind)[0]) for item in value)
    return kind is Any or isinstance(value, get_origin(kind) or kind)
