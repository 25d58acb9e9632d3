"""The cache folders of libraries, and errors that come from one that cannot be written."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path

from titanlite.errors import ConfigError


def unwritable_cache(error: BaseException | None) -> ConfigError | None:
    """Return the error to show if ``error`` comes from a cache folder that cannot be written; else None."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        if isinstance(error, OSError) and isinstance(error.filename, str):
            place = Path(os.path.abspath(error.filename))
            for variable, folder in _folders().items():
                inside = folder in (place, *place.parents) or place in folder.parents
                if inside and (reason := _obstacle(folder)):
                    return ConfigError(
                        f"the cache folder {folder} cannot be written ({reason}); make it writable, or name another "
                        f"one with the environment variable {variable}"
                    )
        error = error.__cause__ or error.__context__
    return None


def _folders() -> dict[str, Path]:
    """Return the cache folders, by the environment variables that name them."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    defaults = {
        "HF_DATASETS_CACHE": "",
        "HF_HUB_CACHE": "",
        "HF_HOME": f"{cache}/huggingface",
        "TORCHINDUCTOR_CACHE_DIR": f"{tempfile.gettempdir()}/torchinductor_{getpass.getuser()}",
        "TRITON_CACHE_DIR": f"{os.environ.get('TRITON_HOME') or '~'}/.triton/cache",
    }
    named = {variable: os.environ.get(variable) or default for variable, default in defaults.items()}
    return {variable: Path(os.path.abspath(os.path.expanduser(name))) for variable, name in named.items() if name}


def _obstacle(folder: Path) -> str:
    """Return the reason why ``folder`` cannot be written; empty if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as e:
        return e.strerror or str(e)
