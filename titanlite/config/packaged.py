"""The TOML files that come with titanlite: next to the package in a clone, inside it in a wheel."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
FOLDER = next((d for d in (_PACKAGE / "train_configs", _PACKAGE.parent / "train_configs") if d.is_dir()), _PACKAGE)


def names() -> list[str]:
    """Return the names of all files: paths below their folder, without ``.toml``, such as ``llama3_8b`` and
    ``finetune/phi_4_hellaswag``."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.toml"))


def find(name: str) -> str | None:
    """Return the path of the file of this name, relative if it is below the current folder; None if there is no such
    file. The last part of a name, such as ``phi_4_hellaswag``, is enough."""
    known = {full.rpartition("/")[2]: full for full in names()} | {full: full for full in names()}
    if name not in known:
        return None
    path = FOLDER / f"{known[name]}.toml"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
