"""Find and open the local files of a data source, and report missing, unreadable and left out ones."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import logging
import os
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import IO, cast

from titanlite.errors import ConfigError, counted

logger = logging.getLogger(__name__)

_OPTION = "training.dataset_path"
# The last suffix of a compressed file. Its name without it says the format: ``a.jsonl.gz`` holds JSON lines.
COMPRESSED = (".gz", ".zst")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
_EXAMPLES = 3
_ENDS = 4096  # bytes of each end of a file that identify it


def require_path(name: str, path: str | None, hint: str) -> str:
    """Return ``path``. If it is empty, raise a ConfigError for the source ``name``, with ``hint`` on valid values."""
    if not path:
        raise ConfigError(
            f"reads local files, and {_OPTION} is empty; set {_OPTION} to {hint}", key="training.dataset", value=name
        )
    return path


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files of ``path``, sorted, so that every process gets the same list.

    A name that exists is that file or folder, whatever characters it has; only another name can be a glob. One warning
    names files of a folder that are not read.

    Args:
        path: a file, a folder (searched at every depth for ``suffixes``; hidden files are left out), or a glob
            (``**`` for any depth).
        suffixes: the suffixes to search a folder for, in lower case, such as ``(".txt",)``; those of files may be in
            capitals.

    Raises:
        ConfigError: the path does not exist, no file matches, or a file is a pipe or a device.
    """
    name = path if os.path.lexists(path) else os.path.expanduser(path)
    known = ", ".join(suffixes)
    if os.path.isdir(name):
        everything = sorted(_walk(name))
        files = [file for file in everything if file.name.lower().endswith(suffixes) and not _is_special(file)]
        left_out = sorted(set(everything) - set(files))
        examples = ", ".join(str(file.relative_to(name)) for file in left_out[:_EXAMPLES])
        holds = f"{counted(len(left_out), 'file')} with other names{f', for example {examples}' if left_out else ''}"
        problem = f"the folder has no files named {known}, and {holds}; for other names use a glob: {path}/**/*.rst"
        if files and left_out:
            _warn(f"{path} has {holds}, which are NOT READ; the names that are read end in {known}")
    elif os.path.lexists(name):
        files, problem = [Path(name)], ""
        if glob.has_magic(name):
            logger.info(f"{_OPTION} = {path}: a file of this name exists, so it is no glob")
    else:
        files = sorted(Path(match) for match in _matches(name) if not os.path.isdir(match))
        reason = "no file matches this glob" if glob.has_magic(name) else "there is no such file or folder"
        problem = f"{reason} (a path is relative to the current folder, {os.getcwd()}); correct {_OPTION}"
    if not files:
        raise ConfigError(problem, key=_OPTION, value=path)
    for file in files:
        if _is_special(file):
            raise ConfigError(
                f"{file} is a pipe or a device, and data are read more than once; save them as a file",
                key=_OPTION,
                value=path,
            )
    return files


def _walk(folder: str, *, hidden: bool = False, way: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yield the files below ``folder``.

    A link to a folder is followed, unless it leads to one on the way to it, or above: that would never end.

    Args:
        hidden: with those whose name, or a folder's, begins with a dot.
        way: the real paths of the folders that led here.

    Raises:
        ConfigError: a folder cannot be read.
    """
    here = os.path.realpath(folder)
    if any(os.path.commonpath([here, above]) == here for above in way):
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(Path(folder), error) from error
    for name in names:
        if hidden or not name.startswith("."):
            path = os.path.join(folder, name)
            if os.path.isdir(path):
                yield from _walk(path, hidden=hidden, way=(*way, here))
            else:
                yield Path(path)


def _is_special(file: Path) -> bool:
    try:
        return not stat.S_ISREG(file.stat().st_mode)
    except OSError:  # opening it gives the message
        return False


def _matches(pattern: str) -> Iterator[str | Path]:
    """Yield the names that match a glob. Leading folders that exist under their very names are no patterns."""
    parts = Path(pattern).parts
    count = next(n for n in range(len(parts), -1, -1) if os.path.isdir(os.path.join("", *parts[:n])) or n == 0)
    escaped = [glob.escape(part) for part in parts[:count]]
    depth = parts.index("**", count) if "**" in parts[count:] else len(parts)
    begin, rest = os.path.join("", *escaped, *parts[count:depth]), parts[depth:]
    if not rest:
        yield from glob.iglob(begin)
        return
    # Not with glob, which follows links in circles.
    for folder in glob.iglob(begin or "."):
        if os.path.isdir(folder):
            files = _walk(folder, hidden=any(part.startswith(".") for part in rest))
            yield from (file for file in files if _fits(file.relative_to(folder).parts, rest))


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """Return True if the parts of a path match those of a glob: ``**`` any number of them, ``*`` none that is hidden,
    as in the module glob."""
    if not patterns:
        return not names
    if patterns[0] == "**":
        visible = next((i for i, name in enumerate(names) if name.startswith(".")), len(names))
        rests = (names[i:] for i in range(visible + 1))
        return (len(patterns) == 1 and visible == len(names)) or any(_fits(rest, patterns[1:]) for rest in rests)
    is_hidden = bool(names) and names[0].startswith(".") and not patterns[0].startswith(".")
    return bool(names) and not is_hidden and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


@cache  # once, although each process, and validation too, finds its own files
def _warn(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def with_compressed(*suffixes: str) -> tuple[str, ...]:
    """Return the suffixes of files, and of the same files compressed."""
    return (*suffixes, *(suffix + compression for compression in COMPRESSED for suffix in suffixes))


def is_compressed(file: Path) -> bool:
    return file.suffix.lower() in COMPRESSED


def open_file(file: Path) -> IO[bytes]:
    """Open a file to read its bytes from beginning to end; a compressed one is decompressed piece by piece.

    Raises:
        ConfigError: the file cannot be opened. Reading can raise OSError, EOFError and zlib.error.
    """
    try:
        if file.suffix.lower() == ".gz":
            return cast(IO[bytes], gzip.open(file, "rb"))
        if file.suffix.lower() == ".zst":
            import pyarrow

            with file.open("rb") as stream:
                if not stream.read(1):  # no frame at all is an error to zstd
                    return io.BytesIO()
            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(os.fsencode(file)), "zstd"))
        return file.open("rb")
    except OSError as error:
        raise unreadable(file, error) from error


def fingerprint(files: Sequence[Path]) -> str:
    """Return a digest of the content of ``files``, in their order: of the sizes, and the first and last 4 KiB of each.

    Names do not count, so a folder can be moved. A change within a large file that keeps its size is not seen.

    Raises:
        ConfigError: a file cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                digest.update(size.to_bytes(8, "big") + stream.read(_ENDS))
                if size > _ENDS:
                    stream.seek(max(_ENDS, size - _ENDS))
                    digest.update(stream.read(_ENDS))
        except OSError as error:
            raise unreadable(file, error) from error
    return digest.hexdigest()


def unreadable(file: Path, error: OSError) -> ConfigError:
    """Return the error for a file that exists but cannot be read."""
    return ConfigError(
        f"{_OPTION}: {file} cannot be read ({error.strerror or error}); correct its permissions or leave it out"
    )
