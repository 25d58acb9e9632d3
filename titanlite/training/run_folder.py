"""The run folder: one job, one folder, one writer."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from titanlite.checkpoint import saved_steps
from titanlite.config import JobConfig
from titanlite.config.job_name import OUTSIDE
from titanlite.config.options import options_of
from titanlite.config.refuse import refuse
from titanlite.config.run_changes import Changes, keep_changes
from titanlite.config.run_config import (
    CHANGES,
    CONFIG,
    DATA_IDENTITY,
    EARLIER,
    FOLDERS,
    HF_CONFIG,
    LOCK,
    METRICS,
    MODEL,
    SAMPLE,
    TOKENIZER,
    VALIDATION,
    WANDB,
    inner_folder,
    mark_as_made_here,
    read_run_config,
    run_config_of,
    section_in,
    was_made_here,
    write_run_config,
)
from titanlite.data import Tokenizer
from titanlite.errors import ConfigError, shown

logger = logging.getLogger(__name__)

_LONGEST_ROW = 1 << 20  # bytes; a longer line of metrics.jsonl is no row


class RunFolder:
    """``job.dump_folder``, locked for as long as this process lives.

    Attributes:
        earlier: the configuration of the run that the folder holds; empty if there is none, or it cannot be read.

    Raises:
        ConfigError: the folder cannot be written, another run is using it, or a link in it leads out of it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = self._open_lock()
        self._take_lock()
        self.earlier = read_run_config(path)

    def _open_lock(self) -> IO[str]:
        path = self.path
        try:
            _refuse_links_out(path)
            self._made = [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            return (path / LOCK).open("a")
        except OSError as e:
            raise ConfigError(
                f"the run folder cannot be written: {e.strerror or e}; choose another with --job.dump_folder",
                key="job.dump_folder",
                value=path,
            ) from None

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
                if not self._is_there():
                    self._lock = self._open_lock()
                    continue
                self._lock.truncate(0)
                self._lock.write(f"{os.getpid()}\n")
                self._lock.flush()
                return
        raise ConfigError(
            f"another run{self._holder()} is writing to this folder; wait for it, "
            "or choose another folder with --job.dump_folder",
            key="job.dump_folder",
            value=self.path,
        )

    def _holder(self) -> str:
        """Return the process that holds the lock, for the message; empty while it has not written its number yet, or
        has removed the file."""
        with contextlib.suppress(OSError, ValueError):
            if number := re.fullmatch(r"(\d+)\n", (self.path / LOCK).read_text()):
                return f" (process {number[1]})"
        return ""

    def _is_there(self) -> bool:
        """Return False if the run that held the lock has removed it; see :meth:`discard`."""
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / LOCK).stat())
        except FileNotFoundError:
            return False

    def discard(self) -> None:
        """Remove the folder again, and those around it, if this run made them and has written nothing into them."""
        if self._made and [path.name for path in self.path.iterdir()] == [LOCK]:
            (self.path / LOCK).unlink()
            with contextlib.suppress(OSError):  # something has come into it
                for folder in self._made:
                    folder.rmdir()

    def refuse_to_retire(self, config: JobConfig) -> None:
        """Refuse to begin at step 1 if the folder holds a run that can be continued, unless the command line asks for
        that with ``--checkpoint.enable_checkpoint=false``."""
        options = config.checkpoint
        before = inner_folder(self.earlier, "checkpoint", "folder") or options.folder
        saved = {name: steps[-1] for name in (before, options.folder) if (steps := saved_steps(self.path / name))}
        if not saved:
            return
        key, (name, step) = "checkpoint.enable_checkpoint", next(iter(saved.items()))
        run = f"{self.path} holds a run with checkpoints, the last is {name}/step-{step}; continue it with"
        if not options.enable_checkpoint and not config.origin(key).startswith("the argument"):
            other = "" if name == options.folder else f" --checkpoint.folder={name}"
            refuse(
                config,
                key,
                f"{run} --{key}{other}, or move it to {self.path / EARLIER} and begin at step 1 with --{key}=false, "
                "or choose another folder with --job.dump_folder",
            )
        if options.enable_checkpoint and options.folder not in saved:
            refuse(
                config,
                "checkpoint.folder",
                f"{run} --checkpoint.folder={name}, or choose another folder with --job.dump_folder",
            )

    def begin(self, config: JobConfig, shape: dict[str, Any] | None = None) -> None:
        """Set an earlier run aside, and make this the folder of a new run.

        Args:
            shape: see :meth:`_keep_shape`.
        """
        trees = run_config_of(config, self.path), self.earlier
        folders = dict.fromkeys(inner_folder(tree, *option) for tree in trees for option in FOLDERS)
        fixed = (CONFIG, METRICS, VALIDATION, CHANGES, TOKENIZER, DATA_IDENTITY, SAMPLE, MODEL, HF_CONFIG, WANDB)
        self.set_earlier_aside([*fixed, *filter(None, folders)])
        mark_as_made_here(self.path)
        self._keep_shape(config, shape)
        write_run_config(config, self.path)

    def _keep_shape(self, config: JobConfig, shape: dict[str, Any] | None) -> None:
        """Write a copy of ``shape``, the config.json that says the shape of the model, and let ``config`` name the
        copy; None: a flavor says it."""
        if shape is not None:
            folder = self.path / HF_CONFIG
            folder.mkdir(exist_ok=True)
            partial = folder / ".config.json.partial"  # so that the file is there as a whole or not at all
            partial.write_text(json.dumps(shape, indent=2) + "\n", encoding="utf-8")
            partial.rename(folder / "config.json")
            config.model.hf_config = str(folder)

    def go_on(
        self, config: JobConfig, step: int, processes: tuple[int, int], shape: dict[str, Any] | None = None
    ) -> None:
        """Make this the folder of the same run after ``step``, and log which options are not those of before.

        Args:
            processes: their number before, and now.
            shape: see :meth:`_keep_shape`.
        """
        self._keep_shape(config, shape)
        folder = config.checkpoint.folder
        later = [f"{folder}/step-{saved}" for saved in saved_steps(self.path / folder) if saved > step]
        self.set_earlier_aside(later)
        for file in (METRICS, VALIDATION):
            drop_rows_after(self.path / file, step)
        changes = _changes(self.earlier, config, self.path) if self.earlier else {}
        if processes[0] != processes[1]:
            changes["processes"] = (f"{processes[0]}", f"{processes[1]}")
        if changes:
            told = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in changes.items())
            logger.info("the run goes on with other options than before: %s", told)
        keep_changes(self.path, step, changes)
        write_run_config(config, self.path)

    def set_earlier_aside(self, names: list[str]) -> None:
        """Move the files of an earlier run to ``earlier/<time of its start>``, so that nothing is mixed or lost."""
        # One folder can lie in another: the outer one takes it along.
        files = sorted({self.path / name for name in names if (self.path / name).exists()}, key=lambda p: len(p.parts))
        if not files:
            return
        started = time.strftime("%Y%m%d-%H%M%S", time.localtime(min(p.stat().st_mtime for p in files)))
        aside = self.path / EARLIER / started
        number = 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"{started}-{number}")
        aside.mkdir(parents=True)
        for path in filter(os.path.lexists, files):
            kept = aside / path.relative_to(self.path)
            kept.parent.mkdir(parents=True, exist_ok=True)
            if path.is_symlink():  # it may be relative to the run folder
                kept.symlink_to(os.path.realpath(path))
                path.unlink()
            else:
                path.rename(kept)
        moved = ", ".join(str(path.relative_to(self.path)) for path in files)
        logger.info("%s held an earlier run: its %s are now in %s", self.path, moved, aside)

    def keep_sample(self, prompt: str, text: str) -> None:
        """Write the text that the model has continued ``prompt`` with, the prompt included."""
        sample = json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False, indent=2) + "\n"
        try:
            (self.path / SAMPLE).write_text(sample, encoding="utf-8", errors="backslashreplace")
        except OSError as e:  # the run itself is done
            logger.warning("%s cannot be written: %s", self.path / SAMPLE, e.strerror or e)

    def keep_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Write a copy of the run's tokenizer into the folder."""
        folder = self.path / TOKENIZER
        folder.mkdir(exist_ok=True)
        tokenizer.save(folder)

    def keep_data_identity(self, identities: Mapping[str, Mapping[str, str | int]]) -> None:
        """Write what the loaders of "training" and "validation" say of the text that they read: a digest of the files
        among it. ``titanlite compare`` tells by it if two runs have the same data, wherever these lie."""
        (self.path / DATA_IDENTITY).write_text(json.dumps(identities, indent=2) + "\n", encoding="utf-8")


def _refuse_links_out(run_folder: Path) -> None:
    """Check that a run, which writes, deletes and moves files in its folder, does so there alone. A folder from
    somebody else could hold a link to a file of this user, or a pipe, which blocks whoever opens it. This user may link
    to folders on another disk: in a run that was made here, or before the first one."""
    if not run_folder.is_dir() or was_made_here(run_folder):
        return
    if all(path.is_symlink() and path.is_dir() for path in run_folder.iterdir()):
        return
    border = Path(os.path.realpath(run_folder))
    folders = [run_folder]
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
    partial = file.with_name(f".{file.name}.partial")
    with partial.open("wb") as kept:
        kept.writelines(line.rstrip(b"\r\n") + b"\n" for line in _lines(file) if _number(line, "step") <= step)
    partial.rename(file)


def _lines(file: Path) -> Iterator[bytes]:
    with file.open("rb") as lines:
        while line := lines.readline(_LONGEST_ROW):
            yield line


def _number(line: bytes, key: str) -> float:
    """Return a number of a row; infinity if the row was cut short, or the line is none."""
    try:
        return float(json.loads(line)[key])
    except (ValueError, TypeError, LookupError, RecursionError):
        return math.inf


def logged_rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of the metrics of a run folder, without those that were cut short."""
    with contextlib.suppress(OSError):
        for line in _lines(folder / METRICS):
            if math.isfinite(_number(line, "step")) and math.isfinite(_number(line, "tokens_seen")):
                yield {"loss": None, **json.loads(line)}


def loss_of_first_step(folder: Path) -> float | None:
    """Return the loss of step 1 in the metrics of a run folder; None if it is not there, or was not finite."""
    try:
        first = next(_lines(folder / METRICS), b"")
    except OSError:
        return None
    loss = _number(first, "loss")
    return loss if _number(first, "step") == 1 and math.isfinite(loss) else None


def _changes(earlier: dict[str, Any], config: JobConfig, folder: Path) -> Changes:
    """Return the options of a run that are not those of ``earlier``, each with its old and new value, as in TOML."""
    current = run_config_of(config, folder)
    changes: Changes = {}
    for section, options in options_of(type(config)).items():  # type: ignore[arg-type]
        for option in options.values() if section not in OUTSIDE else ():
            old, new = (
                section_in(tree, section).get(option.key, unset)
                for tree, unset in ((earlier, option.default), (current, None))
            )
            if old != new:
                changes[option.name] = (shown(old), shown(new))
    return changes
