"""The TOML files that come with titanlite: next to the package in a clone, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDER = next((d for d in (_PACKAGE / "train_configs", _PACKAGE.parent / "train_configs") if d.is_dir()), _PACKAGE)


def names() -> list[str]:
    """Return all names that :func:`find` accepts."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def find(name: str) -> str | None:
    """Return the path of the file ``name``.toml, relative if it is below the current folder; None if there is no such
    file."""
    if name not in names():
        return None
    path = FOLDER / f"{name}.toml"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
