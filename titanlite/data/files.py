"""Which local files a data source reads, and the errors for those it cannot."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from titanlite.errors import ConfigError

_OPTION = "training.dataset_path"


def require_path(name: str, path: str | None, what: str) -> str:
    """The path, or a ConfigError that says what the source ``name`` would read from it."""
    if not path:
        raise ConfigError(
            f"reads local files, and {_OPTION} is empty; set {_OPTION} to {what}", key="training.dataset", value=name
        )
    return path


def find_files(path: str, suffixes: tuple[str, ...]) -> list[Path]:
    """The files that ``path`` means, sorted, so that every process sees the same list.

    Args:
        path: a file, a folder (searched at every depth for ``suffixes``; hidden files are left out), or a glob
            (``**`` for any depth).
        suffixes: what a folder is searched for, such as ``(".txt",)``.

    Raises:
        ConfigError: there is nothing there, or nothing that matches.
    """
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        pattern = os.path.join(glob.escape(expanded), "**", "*")
        found = [name for name in glob.glob(pattern, recursive=True) if name.endswith(suffixes)]
        problem = f"the folder has no {' or '.join(suffixes)} files; for other names use a glob such as {path}/**/*.rst"
    elif os.path.exists(expanded):
        return [Path(expanded)]
    else:
        found = glob.glob(expanded, recursive=True)
        is_glob = glob.has_magic(expanded)
        what = "no file matches this glob" if is_glob else "there is no such file or folder"
        problem = f"{what} (a path is relative to the current folder, {os.getcwd()}); correct {_OPTION}"
    files = sorted(Path(name) for name in found if not os.path.isdir(name))
    if not files:
        raise ConfigError(f'{_OPTION} = "{path}": {problem}')
    return files


def unreadable(file: Path, error: OSError) -> ConfigError:
    """The error for a file that exists but cannot be read."""
    return ConfigError(
        f"{_OPTION}: {file} cannot be read ({error.strerror or error}); correct its permissions or leave it out"
    )
