"""Find runs and read them: run folders, their parents, what an earlier run left in a folder, and console logs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.compare.console_log import read_console_log
from titanlite.compare.facts import Text, facts_of, texts_of
from titanlite.compare.rows import Array, Columns, read_columns
from titanlite.config.run_changes import options_before, read_changes
from titanlite.config.run_config import (
    CONFIG,
    EARLIER,
    METRICS,
    SAMPLE,
    VALIDATION,
    read_run_config,
)
from titanlite.errors import ConfigError, printable
from titanlite.metrics.last_part import last_part
from titanlite.untrusted import files

_COLUMNS = (
    "loss",
    "grad_norm",
    "tps",
    "mfu",
    "memory_gib",
    "reserved_gib",
    "step_time_s",
    "tokens_seen",
    "skipped_steps",
)
_VALIDATION_COLUMNS = ("loss", "bits_per_byte", "accuracy", "tokens")
_SEVERAL = 3  # rows or skipped steps without a finite loss at the end, from which on a run has diverged
_DEEPEST = 4  # folders between a parent and its runs
_MOST_RUNS = 100
_MOST_SAMPLE = 1 << 20  # bytes


@dataclass
class Run:
    """A run that was read.

    Attributes:
        path: its folder, or its console log.
        name: what it is called; no two runs of a comparison have the same name.
        metrics, validation: their rows, by ascending step.
        options: its configuration by ``section.key``, without options that are unset; empty for a console log.
        options_before: those of earlier steps that are not those of the end, by the first and last of these steps; of a
            run that went on with other ones.
        facts: what decides if its training losses compare, by name: tokens per step, tokenizer. Only what is known.
        text, validation_text: what decides which text it was trained on, and which text its validation losses are of.
        sample: what its model wrote at the end; empty if it is not there.
    """

    path: Path
    name: str
    metrics: Columns
    validation: Columns
    options: dict[str, Any] = field(default_factory=dict)
    options_before: dict[tuple[int, int], dict[str, str]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    text: Text = field(default_factory=Text)
    validation_text: Text = field(default_factory=Text)
    sample: str = ""

    @property
    def steps(self) -> int:
        return int(self.metrics["step"][-1])

    def last(self, name: str) -> float | None:
        """Return the last value of a column; None if it is not known."""
        return _known(self.metrics[name][-1:])

    def rows_without_loss_at_the_end(self) -> int:
        finite = np.flatnonzero(np.isfinite(self.metrics["loss"]))
        return len(self.metrics["step"]) - (int(finite[-1]) + 1 if len(finite) else 0)

    def diverged_at(self) -> int | None:
        """Return the first logged step from which on no loss is finite; None if there is no such step, or only so few
        rows, and skipped steps in them, that the run goes on."""
        rows = self.rows_without_loss_at_the_end()
        skipped = self.metrics["skipped_steps"][-rows - 1 :]
        in_them = float(skipped[-1] - (skipped[0] if len(skipped) > rows else 0)) if rows else 0.0
        if rows >= min(_SEVERAL, len(self.metrics["step"])) or in_them >= _SEVERAL:
            return int(self.metrics["step"][-rows]) if rows else None
        return None

    def last_share(self) -> float:
        """Return the share of the rows that is the last part, see :func:`titanlite.metrics.last_part.last_part`."""
        rows = len(self.metrics["step"])
        return min(last_part(rows) / rows, 0.5)  # of a single row, too

    def final_loss(self, share: float) -> float | None:
        """Return the mean loss of the last ``share`` of the steps; None if the run ended without a finite one."""
        if self.diverged_at() is not None:
            return None
        step, losses = self.metrics["step"], self.metrics["loss"]
        losses = losses[(step > step[-1] * (1 - share) + 1e-6) & np.isfinite(losses)]
        return _known(losses)

    def last_validation(self, name: str) -> float | None:
        return _known(self.validation[name][-1:])

    def median(self, name: str) -> float | None:
        """Return the median of a column, without the first row, which has compilation, if there are more."""
        values = self.metrics[name][1:] if len(self.metrics[name]) > 1 else self.metrics[name]
        values = values[np.isfinite(values)]
        return float(np.median(values)) if len(values) else None

    def peak_memory(self) -> float | None:
        """Return the peak memory in GiB, as the log shows it: reserved on GPUs, the resident set on the CPU."""
        reserved, active = (self.metrics[name] for name in ("reserved_gib", "memory_gib"))
        values = reserved if np.isfinite(reserved).any() else active
        values = values[np.isfinite(values)]
        return float(values.max()) if len(values) else None


def _known(values: Array) -> float | None:
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs that ``paths`` name, each once: a run folder, a folder with runs in it, or a console log. If they
    name one run folder alone, the earlier runs that it holds come before it. Of the runs in a folder, those that cannot
    be read are left out; the second value has a sentence for each.

    Raises:
        ConfigError: there is no run at a path; a run that is named itself cannot be read.
    """
    places = {os.path.realpath(place): place for path in paths for place in _places(path)}
    if len(places) == 1:
        ((real, place),) = places.items()
        earlier = place / EARLIER
        places = {os.path.realpath(run): run for run in _below(earlier)} | {real: place}
    if len(places) > _MOST_RUNS:
        raise ConfigError(f"these are {len(places)} runs, and at most {_MOST_RUNS} are compared; name fewer")
    named = {os.path.realpath(_folder(path)) for path in paths}
    runs: list[Run] = []
    left_out: list[ConfigError] = []
    for real, place in places.items():
        try:
            runs.append(_read(place))
        except ConfigError as e:
            if real in named:
                raise
            left_out.append(e)
    if not runs:
        raise left_out[0]
    return runs, [f"Left out: {e}." for e in left_out]


def _folder(path: Path) -> Path:
    """Return the run folder where ``path`` is one of its files, else ``path``."""
    is_of_run = path.name in (METRICS, CONFIG, VALIDATION) and (path.parent / METRICS).is_file()
    return path.parent if is_of_run else path


def _places(path: Path) -> list[Path]:
    path = _folder(path)
    if not path.exists():
        raise ConfigError(f"{path}: there is no such file or folder; name a run folder, its parent, or a console log")
    if not path.is_file() and not path.is_dir():
        raise ConfigError(f"{path}: it is a pipe, a socket or a device; write its text to a file, and name that")
    runs = [path] if path.is_file() else [*_below(path)]
    if not runs:
        raise ConfigError(f"{path}: there is no run in it: no {METRICS}. A run writes it after its first step")
    return runs


def _below(folder: Path, depth: int = _DEEPEST) -> Iterator[Path]:
    if (folder / METRICS).is_file():
        yield folder
    elif depth and folder.is_dir():
        try:
            inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
        except OSError:
            return
        for path in inner:
            yield from _below(path, depth - 1)


def _read(place: Path) -> Run:
    try:
        run = _read_folder(place) if place.is_dir() else _read_log(place)
    except OSError as e:
        raise ConfigError(f"{place}: cannot be read: {e.strerror or e}") from None
    if not len(run.metrics["step"]):
        line = "" if place.is_dir() else ' (a line with "step: 10  loss:  3.2100")'
        raise ConfigError(f"{place}: there is no logged step{line} in it; wait for the first one, or name another run")
    return run


def _read_folder(folder: Path) -> Run:
    metrics = read_columns(folder / METRICS, _COLUMNS)
    step, seconds = metrics["step"], metrics["step_time_s"]
    # The first row is of all steps before it, or where later ones are far apart, of the first step alone.
    before = step[:1] - (np.median(np.diff(step)) if len(step) > 1 else 1)
    steps = np.diff(step, prepend=np.maximum(before, 0))
    metrics["hours"] = np.cumsum(np.nan_to_num(seconds) * steps) / 3600
    validation_file = folder / VALIDATION
    validation = read_columns(validation_file, _VALIDATION_COLUMNS) if validation_file.is_file() else no_rows()
    options = flat(read_run_config(folder))
    name = options.pop("job.name", None)
    name = printable(name) if isinstance(name, str) and name else folder.resolve().name
    validation["tokens_seen"] = _tokens_at(validation["step"], metrics)
    facts, texts = facts_of(folder, options, metrics), texts_of(folder, options)
    other_options = options_before(read_changes(folder))
    return Run(folder, name, metrics, validation, options, other_options, facts, *texts, _sample(folder))


def _tokens_at(steps: Array, metrics: Columns) -> Array:
    """Return the tokens seen at ``steps`` (rows,), between the logged ones; NaN outside of them."""
    known = np.isfinite(metrics["tokens_seen"])
    if not known.any():
        return np.full(len(steps), np.nan)
    seen = metrics["tokens_seen"][known]
    return np.interp(steps, metrics["step"][known], seen, left=np.nan, right=np.nan)


def _read_log(file: Path) -> Run:
    log = read_console_log(file)
    metrics = _empty(len(log.metrics["step"]), _COLUMNS) | log.metrics
    validation = _empty(len(log.validation["step"]), _VALIDATION_COLUMNS) | log.validation
    validation["tokens_seen"] = _tokens_at(validation["step"], metrics)
    text = Text({name: value for name, value in log.facts.items() if name.startswith("training.dataset")})
    facts = {name: value for name, value in log.facts.items() if name not in text.options}
    return Run(file, printable(log.name) or file.stem, metrics, validation, facts=facts, text=text)


def _empty(rows: int, names: Sequence[str]) -> Columns:
    return {name: np.full(rows, np.nan) for name in names}


def no_rows() -> Columns:
    return _empty(0, ("step", *_VALIDATION_COLUMNS, "tokens_seen"))


def flat(tree: dict[str, Any], outer: str = "") -> dict[str, Any]:
    """Return the values of a configuration by ``section.key``."""
    values: dict[str, Any] = {}
    for name, value in tree.items():
        values |= flat(value, f"{outer}{name}.") if isinstance(value, dict) else {f"{outer}{name}": value}
    return values


def _sample(folder: Path) -> str:
    try:
        sample = json.loads(files.read_bytes(folder / SAMPLE, _MOST_SAMPLE))
        return f"{sample['text']}"
    except (OSError, ConfigError, ValueError, LookupError, TypeError, RecursionError):
        return ""
