"""Checkpoint folders. A checkpoint is complete and has checksums, or it does not exist.

A checkpoint is written into ``.partial-step-N``. Every file is flushed to disk, then one rename makes the folder
``step-N``. ``sha256sum --check`` can read its ``SHA256SUMS`` too. The names of leftovers of killed processes begin with
a dot; they are deleted at the next start.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.config.run_config import MODEL, inner_folder, read_run_config
from titanlite.config.value_rules import PATH
from titanlite.errors import ConfigError
from titanlite.untrusted.files import Untrusted, contained, open_file, read_bytes

INFO = "checkpoint.json"
SUMS = "SHA256SUMS"
_SELF = "# of the lines above: "  # sha256sum reads this line as a comment
_PARTIAL, _DELETING = ".partial-", ".deleting-"
_BLOCK = 1 << 22
_MOST_SUMS = 1 << 26  # bytes: half a million files


class DamagedCheckpoint(ConfigError):
    """A checkpoint has missing, changed or unreadable files; ``problems`` has one line per file."""

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.description = f"the checkpoint {folder} is damaged: {'; '.join(problems)}"
        super().__init__(f"{self.description}; restore the files")
        self.folder, self.problems = folder, problems


def step_folder(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def partial_folder(root: Path, step: int) -> Path:
    return root / f"{_PARTIAL}step-{step}"


def saved_steps(root: Path) -> list[int]:
    """Return the steps of the checkpoints in ``root``, in ascending order."""
    return sorted(int(path.name.removeprefix("step-")) for path in _steps_in(root) if is_checkpoint(path))


def strays_in(root: Path) -> list[Path]:
    """Return what is called like a checkpoint in ``root`` and is none."""
    return sorted(path for path in _steps_in(root) if not is_checkpoint(path))


def _steps_in(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return [path for path in root.iterdir() if re.fullmatch(r"step-(0|[1-9]\d*)", path.name)]


def is_checkpoint(folder: Path) -> bool:
    """Return True if ``folder`` holds a file of a checkpoint, which may be damaged."""
    return folder.is_dir() and any(any(folder.glob(name)) for name in (INFO, SUMS, ".metadata", "*.distcp"))


def latest_checkpoint(path: str | Path) -> Path:
    """Return the latest checkpoint in ``path``, if that is a run folder or a folder of checkpoints; else the model that
    a run without checkpoints has kept, else ``path``.

    Raises:
        ConfigError: the system cannot look up ``path``, or the checkpoint is a link that leads out of its folder.
    """
    if not PATH.holds(str(path)):
        raise ConfigError(f"{path}: must be {PATH.text}")
    path = Path(path).expanduser()
    checkpoints = inner_folder(read_run_config(path), "checkpoint", "folder") or "checkpoint"
    for root in (path, path / checkpoints, path / MODEL):
        if steps := saved_steps(root):
            return contained(root, step_folder(root, steps[-1]).name)
    return path


def clear_leftovers(root: Path) -> list[str]:
    """Delete the folders that killed saves and deletions left behind; return their names."""
    if not root.is_dir():
        return []
    leftovers = [path for path in root.iterdir() if path.name.startswith((_PARTIAL, _DELETING))]
    for path in leftovers:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            shutil.rmtree(path)
    return sorted(path.name for path in leftovers)


def delete(folder: Path) -> Path:
    """Rename a checkpoint atomically, so that it no longer counts as one; return the new folder, whose files the caller
    removes (slow)."""
    return _renamed(folder, _DELETING)


def set_stray_aside(path: Path) -> Path:
    """Rename what has the name of a checkpoint and is none; return its new path."""
    return _renamed(path, "stray-")


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that no run loads it but users can inspect it; return its new folder."""
    return _renamed(folder, "damaged-")


def _renamed(folder: Path, prefix: str) -> Path:
    """Put ``prefix`` before the folder's name, and a number after it if that name is taken; return the new folder."""
    number, renamed = 1, folder.with_name(f"{prefix}{folder.name}")
    while renamed.exists():  # from an earlier save of the same step
        number += 1
        renamed = folder.with_name(f"{prefix}{folder.name}-{number}")
    folder.rename(renamed)
    return renamed


def make_folder(folder: Path) -> None:
    """Create a folder, with its parents, and flush its directory entry so that it survives a power failure."""
    if not folder.is_dir():
        folder.mkdir(parents=True)
        flush(folder.parent)


def write_file(path: Path, text: str) -> str:
    """Write ``text`` to a new file and flush it to disk; return its SHA-256 (hexadecimal)."""
    with HashingFile(path) as file:
        file.write(text.encode())
    return file.digest


def commit(partial: Path, final: Path, sums: Mapping[str, str]) -> None:
    """Turn the folder ``partial``, whose files are flushed, into the checkpoint ``final``.

    Args:
        sums: file name -> SHA-256.
    """
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    write_file(partial / SUMS, f"{lines}{_SELF}{hashlib.sha256(lines.encode()).hexdigest()}\n")
    flush(partial)
    os.rename(partial, final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Write a file's content, or a folder's entries, from the system's cache to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_sums(folder: Path) -> dict[str, str]:
    """Return file name -> SHA-256 for the files of a checkpoint.

    Raises:
        DamagedCheckpoint: ``SHA256SUMS`` is missing or changed.
    """
    try:
        text = read_bytes(contained(folder, SUMS), _MOST_SUMS).decode("ascii")
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise DamagedCheckpoint(
            folder, [f"{SUMS} is {'missing' if isinstance(e, FileNotFoundError) else 'changed'}"]
        ) from None
    except Untrusted as e:
        raise DamagedCheckpoint(folder, [str(e)]) from None
    lines, _, digest = text.rpartition(_SELF)
    if digest != hashlib.sha256(lines.encode()).hexdigest() + "\n":
        raise DamagedCheckpoint(folder, [f"{SUMS} is changed"])
    sums = {line[66:]: line[:64] for line in lines.splitlines()}
    strange = [name for name in sums if name in ("", ".", "..") or "/" in name or not name.isprintable()]
    if strange:
        raise DamagedCheckpoint(folder, [f"{SUMS} names {strange[0]!r}, which is no file of this folder"])
    return sums


def problems_of(folder: Path, sums: Mapping[str, str], names: Iterable[str]) -> list[str]:
    """Compare the files ``names`` with their checksums; return one line per missing, changed or unreadable file."""
    problems = ((name, _problem(folder, name, sums[name])) for name in names)
    return [f"{name} {problem}" for name, problem in problems if problem]


def _problem(folder: Path, name: str, expected: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with open_file(contained(folder, name)) as stream:
            block = bytearray(_BLOCK)
            while size := stream.readinto(block):  # type: ignore[attr-defined]
                digest.update(memoryview(block)[:size])
    except FileNotFoundError:
        return "is missing"
    except OSError as e:
        return f"cannot be read: {e.strerror}"
    except Untrusted as e:
        return f"is not read: {e}"
    return None if digest.hexdigest() == expected else "is changed (its SHA-256 is another)"
