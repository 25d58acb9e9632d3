"""Functions that ``run_train.sh``, ``titanlite`` and ``python -m titanlite.train`` share: they read options, and show
messages. Nothing in this module imports torch."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from titanlite.config import JobConfig, load_config
from titanlite.environment import CONFIG_FILE, LAUNCH_DIR
from titanlite.errors import ConfigError, TrainingError
from titanlite.launch.caches import unwritable_cache

EXIT_CONFIG = 2


def read_config(argv: Sequence[str]) -> JobConfig:
    """Read the configuration from the arguments and the file that CONFIG_FILE names. Bad input ends the process."""
    try:
        return load_config(argv, os.environ.get(CONFIG_FILE) or None)
    except ConfigError as e:
        sys.exit(report(e))


def report(error: ConfigError | TrainingError, config: JobConfig | None = None) -> int:
    """Show the message of an expected error, without a traceback, and return the exit status.

    Args:
        config: gives the value and the origin (file and line, or argument) of the option that caused the error, where
            the error does not have them.

    All workers of a run can meet the same error. Under the launcher, each worker writes its message to a file, and the
    launcher shows one of them.
    """
    error = unwritable_cache(error) or error
    if isinstance(error, ConfigError) and error.key and not error.origin and config is not None:
        error.origin = config.origin(error.key)
        if error.value is None:
            with contextlib.suppress(AttributeError):
                error.value = config.value(error.key)
    status = EXIT_CONFIG if isinstance(error, ConfigError) else 1
    message = f"titanlite: error: {error}"
    folder = os.environ.get(LAUNCH_DIR)
    if folder:
        Path(folder, f"error-{os.environ.get('RANK', '0')}.{status}").write_text(message, errors="backslashreplace")
    else:
        print(message, file=sys.stderr)
    return status


def reported(folder: str | None) -> list[Path]:
    """Return the workers' message files in the launcher's folder, oldest first; a file's suffix is the exit status."""
    return sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns) if folder else []
