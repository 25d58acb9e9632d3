"""The run folder: one job, one folder, one writer."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import time
from pathlib import Path

from titanlite.errors import ConfigError

logger = logging.getLogger(__name__)

CONFIG = "config.toml"
METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"


class RunFolder:
    """``job.dump_folder``, locked for as long as this process lives.

    Raises:
        ConfigError: the folder cannot be written, another run is using it, or a link in it leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            _refuse_links_out(path)
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("a")
        except OSError as e:
            raise ConfigError(
                f"the run folder cannot be written: {e.strerror or e}; choose another with --job.dump_folder",
                key="job.dump_folder",
                value=path,
            ) from None
        self._take_lock()

    def _take_lock(self) -> None:
        # A worker of a run that was just killed may still hold the lock.
        for attempt in range(6):
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.5 if attempt < 5 else 0)
            except OSError as e:
                raise ConfigError(
                    f"this file system has no locks ({e.strerror or e}); choose a "
                    "folder on another with --job.dump_folder",
                    key="job.dump_folder",
                    value=self.path,
                ) from None
            else:
                self._lock.truncate(0)
                self._lock.write(f"{os.getpid()}\n")
                self._lock.flush()
                return
        holder = (self.path / ".lock").read_text().strip()
        raise ConfigError(
            f"another run (process {holder}) is writing to this folder; wait for it, "
            "or choose another folder with --job.dump_folder",
            key="job.dump_folder",
            value=self.path,
        )

    def set_earlier_aside(self, names: list[str]) -> None:
        """Move the files of an earlier run to ``earlier/<time of its start>``, so that nothing is mixed or lost."""
        files = [self.path / name for name in names if (self.path / name).exists()]
        if not files:
            return
        started = time.strftime("%Y%m%d-%H%M%S", time.localtime(min(p.stat().st_mtime for p in files)))
        aside = self.path / "earlier" / started
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{started}-{number}")
        aside.mkdir(parents=True)
        for path in files:
            path.rename(aside / path.name)
        logger.info("%s held an earlier run: its %s are now in %s", self.path, ", ".join(p.name for p in files), aside)


def _refuse_links_out(run_folder: Path) -> None:
    """Check that a run, which writes, deletes and moves files in its folder, does so there alone. A folder from
    somebody else could hold a link to a file of this user, or a pipe, which blocks whoever opens it."""
    border = Path(os.path.realpath(run_folder))
    folders = [run_folder] if run_folder.is_dir() else []
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_symlink() and not (target := Path(os.path.realpath(entry.path))).is_relative_to(border):
                    why = f"a link to {target}, outside of it; remove it, or make the run folder itself such a link"
                elif entry.is_symlink() or entry.is_file():
                    continue
                elif entry.is_dir():
                    folders.append(Path(entry.path))
                    continue
                else:
                    why = "a pipe, a socket or a device; remove it"
                raise ConfigError(f"{entry.path} in the run folder is {why}", key="job.dump_folder", value=run_folder)


def drop_rows_after(file: Path, step: int) -> None:
    """Remove from a file of JSON lines the rows after ``step``, and a last line that is incomplete."""
    if not file.exists():
        return
    kept = [line for line in file.read_text(errors="replace").splitlines() if _step_of(line) <= step]
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(f"{line}\n" for line in kept))
    partial.rename(file)


def _step_of(line: str) -> float:
    try:
        step = json.loads(line)["step"]
    except (ValueError, LookupError, TypeError, RecursionError):  # a row that was cut short, or is none
        return float("inf")
    return step if isinstance(step, (int, float)) else float("inf")
