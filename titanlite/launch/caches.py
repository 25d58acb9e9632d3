"""The cache folders of libraries, and errors that come from one that cannot be written."""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from titanlite.errors import ConfigError


def unwritable_cache(error: BaseException) -> ConfigError | None:
    """Return the error to show if ``error`` comes from a cache folder that cannot be written; else None."""
    places = list(_places(error))
    for variable, folder in _folders() if places else ():
        inside = any(folder == place or folder in place.parents or place in folder.parents for place in places)
        if inside and (reason := _obstacle(folder)):
            return ConfigError(
                f"the cache folder {folder} cannot be written ({reason}); make it writable, or name another one with "
                f"the environment variable {variable}"
            )
    return None


def _places(error: BaseException | None) -> Iterator[Path]:
    """Yield the files of the errors of the operating system that led to ``error``."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and isinstance(error.filename, str):
            yield Path(os.path.abspath(error.filename))
        error = error.__cause__ or error.__context__


def _folders() -> Iterator[tuple[str, Path]]:
    """Yield the environment variables that name cache folders, and these folders."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    hub = os.environ.get("HF_HOME") or f"{cache}/huggingface"
    defaults = {
        "HF_DATASETS_CACHE": None,
        "HF_HUB_CACHE": None,
        "HF_HOME": hub,
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
        "TRITON_CACHE_DIR": f"{os.environ.get('TRITON_HOME') or '~'}/.triton/cache",
    }
    for variable, default in defaults.items():
        if folder := os.environ.get(variable) or default:
            yield variable, Path(os.path.abspath(os.path.expanduser(folder)))


def _obstacle(folder: Path) -> str:
    """Return the reason why ``folder`` cannot be written; empty if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)
