"""Find the local files of a data source, and report missing and unreadable ones."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from titanlite.errors import ConfigError

_OPTION = "training.dataset_path"


def require_path(name: str, path: str | None, hint: str) -> str:
    """Return ``path``. If it is empty, raise a ConfigError for the source ``name``, with ``hint`` on valid values."""
    if not path:
        raise ConfigError(
            f"reads local files, and {_OPTION} is empty; set {_OPTION} to {hint}", key="training.dataset", value=name
        )
    return path


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """Return the files that match ``path``, sorted, so that every process gets the same list.

    Args:
        path: a file, a folder (searched at every depth for ``suffixes``; hidden files are left out), or a glob
            (``**`` for any depth).
        suffixes: the file name suffixes to search a folder for, such as ``(".txt",)``.

    Raises:
        ConfigError: the path does not exist, or no file matches.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        pattern = os.path.join(glob.escape(expanded), "**", "*")
        matches = [name for name in glob.glob(pattern, recursive=True) if name.endswith(suffixes)]
        problem = f"the folder has no {' or '.join(suffixes)} files; for other names use a glob such as {path}/**/*.rst"
    elif os.path.exists(expanded):
        return [Path(expanded)]
    else:
        matches = glob.glob(expanded, recursive=True)
        is_glob = glob.has_magic(expanded)
        reason = "no file matches this glob" if is_glob else "there is no such file or folder"
        problem = f"{reason} (a path is relative to the current folder, {os.getcwd()}); correct {_OPTION}"
    files = sorted(Path(name) for name in matches if not os.path.isdir(name))
    if not files:
        raise ConfigError(f'{_OPTION} = "{path}": {problem}')
    return files


def unreadable(file: Path, error: OSError) -> ConfigError:
    """Return the error for a file that exists but cannot be read."""
    return ConfigError(
        f"{_OPTION}: {file} cannot be read ({error.strerror or error}); correct its permissions or leave it out"
    )
