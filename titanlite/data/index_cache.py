"""Indexes of large corpora, kept between runs: where the documents of each file are, or how many it has.

An index is two files in a cache folder: a header with the identity of each file (size, times of change) and the number
of its entries, and the entries of all files as one array, which every process maps into memory. The first process that
needs an index makes it, and the others of the machine wait for it; where the folder is shared, those of all machines.
A file that has changed is read again, and no other. A corpus that is small is not kept: to read it takes no time.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from titanlite.data.files import unreadable
from titanlite.environment import CACHE_DIR

logger = logging.getLogger(__name__)

_LARGE = 64 << 20  # bytes of a corpus from which on its index is kept
_FORMAT = 1

FileIndex = NDArray[np.int64]  # [entries, width]


class Index(NamedTuple):
    """The entries of all files of a corpus.

    Attributes:
        entries: int64 [number, width], in the order of the files; mapped from a file if the index is kept.
        ends: int64 [files], where the entries of each file end among them.
    """

    entries: FileIndex
    ends: NDArray[np.int64]

    def file_of(self, entry: int) -> int:
        """Return the number of the file that has this entry."""
        return int(np.searchsorted(self.ends, entry, side="right"))


def corpus_index(files: Sequence[Path], kind: str, read: Callable[[Path], FileIndex]) -> Index:
    """Return the index of ``files``.

    Args:
        kind: the name of the index: a corpus can have several.
        read: makes the entries of one file.

    Raises:
        ConfigError: a file cannot be read.
    """
    before = [_identity(file) for file in files]
    if sum(identity[0] for identity in before) < _LARGE:
        return _joined([read(file) for file in files])
    place = cache_folder() / "data" / _key(files, kind)
    cached = _load(place, before)
    if isinstance(cached, Index):
        return cached
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with _locked(place.with_suffix(".lock")):
            cached = _load(place, before)  # another process may have made it by now
            if isinstance(cached, Index):
                return cached
            return _make(place, files, before, cached, read)
    except OSError as error:
        logger.warning(
            f"the index of {kind} data cannot be kept in {place.parent} ({error.strerror or error}), so each process "
            f"reads all files at each start; make it writable, or name another folder with {CACHE_DIR}"
        )
    return _joined([read(file) for file in files])


def cache_folder() -> Path:
    """Return the folder of what titanlite keeps between runs."""
    named = os.environ.get(CACHE_DIR)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "titanlite")


_Identity = tuple[int, int, int]  # the size; when the content, and when anything of the file, changed, in nanoseconds


def _identity(file: Path) -> _Identity:
    try:
        status = file.stat()
    except OSError as error:
        raise unreadable(file, error) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _key(files: Sequence[Path], kind: str) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(os.fsencode(os.path.abspath(file)) + b"\0")
    return f"{kind}-{digest.hexdigest()}"


def _load(place: Path, identities: Sequence[_Identity]) -> Index | list[FileIndex | None]:
    """Return the index if it is that of files with these identities. Else the entries of those that are as before."""
    nothing: list[FileIndex | None] = [None] * len(identities)
    try:
        header = json.loads(place.with_suffix(".json").read_text())
        if header["format"] != _FORMAT or len(header["files"]) != len(identities):
            return nothing
        entries = np.load(place.parent / Path(header["entries"]).name, mmap_mode="r", allow_pickle=False)
        known = [tuple(identity) for identity, _ in header["files"]]
        ends = np.cumsum([count for _, count in header["files"]], dtype=np.int64)
        if entries.dtype != np.int64 or entries.ndim != 2 or len(entries) != ends[-1]:
            return nothing
    except (OSError, EOFError, ValueError, LookupError, TypeError):  # there is none, or it is damaged
        return nothing
    if known == list(identities):
        return Index(entries, ends)
    begins = [0, *ends[:-1].tolist()]
    return [
        entries[begin:end] if was == now else None
        for was, now, begin, end in zip(known, identities, begins, ends.tolist(), strict=True)
    ]


def _make(
    place: Path,
    files: Sequence[Path],
    before: Sequence[_Identity],
    kept: Sequence[FileIndex | None],
    read: Callable[[Path], FileIndex],
) -> Index:
    """Read the files that have changed, and keep the index, unless one of them changes meanwhile."""
    unread = sum(identity[0] for identity, entries in zip(before, kept, strict=True) if entries is None)
    logger.info(f"reading {unread / 1e9:.2f} GB once, for an index of the documents in {place.parent}")
    parts = [read(file) if entries is None else entries for file, entries in zip(files, kept, strict=True)]
    index = _joined(parts)
    if [_identity(file) for file in files] != list(before):
        return index
    previous = set(place.parent.glob(f"{place.name}-*.npy"))
    name = f"{place.name}-{hashlib.blake2b(repr(before).encode(), digest_size=8).hexdigest()}.npy"
    _write(place.parent / name, lambda file: np.save(file, index.entries))
    files_of = [(identity, len(part)) for identity, part in zip(before, parts, strict=True)]
    header = json.dumps({"format": _FORMAT, "entries": name, "files": files_of}).encode()
    _write(place.with_suffix(".json"), lambda file: file.write(header))
    for path in previous - {place.parent / name}:  # a process that has it mapped keeps it
        path.unlink(missing_ok=True)
    loaded = _load(place, before)
    return loaded if isinstance(loaded, Index) else index


def _write(path: Path, write: Callable[..., object]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time in. A file system without locks lets all in: each then makes the same index."""
    with path.open("w") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _joined(parts: Sequence[FileIndex]) -> Index:
    return Index(np.concatenate(parts), np.cumsum([len(part) for part in parts], dtype=np.int64))
