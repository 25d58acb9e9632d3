"""Checkpoints on disk: each is complete and checked, or it does not exist.

A checkpoint is written into ``.partial-step-N``, every file flushed to the disk, and becomes ``step-N`` by one rename.
Its ``SHA256SUMS`` can be read by ``sha256sum --check`` too. What a killed process leaves begins with a dot, and is
cleared.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from titanlite.errors import ConfigError

SUMS = "SHA256SUMS"
_SELF = "# of the lines above: "  # sha256sum takes it for a comment
_PARTIAL, _DELETING = ".partial-", ".deleting-"
_BLOCK = 1 << 22


class DamagedCheckpoint(ConfigError):
    """Files of a checkpoint that are not what was written; ``problems`` has a line for each."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.what = f"the checkpoint {folder} is damaged: {'; '.join(problems)}"
        super().__init__(f"{self.what}; restore the files")
        self.folder, self.problems = folder, problems


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def partial_folder(root: Path, step: int) -> Path:
    return root / f"{_PARTIAL}step-{step}"


def saved_steps(root: Path) -> list[int]:
    """The steps of the checkpoints in ``root``, in order."""
    if not root.is_dir():
        return []
    matches = (re.fullmatch(r"step-(0|[1-9]\d*)", path.name) for path in root.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def clear_leftovers(root: Path) -> list[str]:
    """Delete what killed saves and deletions left; returns their names."""
    if not root.is_dir():
        return []
    left = [path for path in root.iterdir() if path.name.startswith((_PARTIAL, _DELETING))]
    for path in left:
        shutil.rmtree(path)
    return sorted(path.name for path in left)


def delete(folder: Path) -> Path:
    """Let a checkpoint be none any more, at once; returns the folder that is left to be removed, in whatever time that
    takes."""
    number, going = 1, folder.with_name(_DELETING + folder.name)
    while going.exists():  # what could not be removed before
        number += 1
        going = folder.with_name(f"{_DELETING}{folder.name}-{number}")
    folder.rename(going)
    return going


def make_folder(folder: Path) -> None:
    """Make a folder that is still there after a loss of power."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        _flush_folder(folder.parent)


def set_damaged_aside(folder: Path) -> Path:
    """Rename a checkpoint so that none looks for it again, and somebody can; returns its new folder."""
    number, aside = 1, folder.with_name(f"damaged-{folder.name}")
    while aside.exists():
        number += 1
        aside = folder.with_name(f"damaged-{folder.name}-{number}")
    folder.rename(aside)
    return aside


def write_file(path: Path, text: str) -> str:
    """Write and flush to the disk; returns the SHA-256."""
    with HashingFile(path) as file:
        file.write(text.encode())
        os.fsync(file.fileno())
    return file.digest


def commit(partial: Path, final: Path, sums: Mapping[str, str]) -> None:
    """Make ``partial``, whose files are flushed, the checkpoint ``final``.

    Args:
        sums: the SHA-256 of each file by its name.
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_file(partial / SUMS, f"{lines}{_SELF}{hashlib.sha256(lines.encode()).hexdigest()}\n")
    _flush_folder(partial)
    os.rename(partial, final)
    _flush_folder(final.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashingFile(io.RawIOBase):
    """A new file that knows the SHA-256 of what was written to it; ``digest`` once it is closed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "wb", buffering=_BLOCK)  # noqa: SIM115  (closed by close)
        self._hash = hashlib.sha256()
        self.digest = ""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._file.tell()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        self._file.flush()  # who asks wants to fsync
        return self._file.fileno()

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            self.digest = self._hash.hexdigest()
        super().close()


def read_sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint.

    Raises:
        DamagedCheckpoint: the list is not what was written.
    """
    try:
        text = (folder / SUMS).read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise DamagedCheckpoint(
            folder, [f"{SUMS} is {'missing' if isinstance(e, FileNotFoundError) else 'changed'}"]
        ) from None
    lines, _, digest = text.rpartition(_SELF)
    if digest != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise DamagedCheckpoint(folder, [f"{SUMS} is changed"])
    return {line[66:]: line[:64] for line in lines.splitlines()}


def problems_of(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """What is wrong with the files ``names``, a line for each that is not what was written."""
    found = ((name, _problem(folder / name, sums[name])) for name in names)
    return [f"{name} {problem}" for name, problem in found if problem]


def _problem(file: Path, expected: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with file.open("rb", buffering=0) as stream:
            block = bytearray(_BLOCK)
            while size := stream.readinto(block):
                digest.update(memoryview(block)[:size])
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    return None if digest.hexdigest() == expected else "is changed (its SHA-256 is another)"
