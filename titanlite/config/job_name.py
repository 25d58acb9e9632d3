"""The name of a run, for people who look at several: ``job.name``, or what distinguishes it."""

from __future__ import annotations

import re
from pathlib import PurePath
from typing import Any

from titanlite.config.options import Option, options_of
from titanlite.config.schema import JobConfig

# The sections that change neither what a run computes nor how fast.
OUTSIDE = {"job", "profiling", "metrics", "sample", "checkpoint", "comm", "memory_estimation"}
_LONGEST = 100  # characters
_INNER = re.compile(r"model|checkpoint|step-\d+")  # folders in that of a run, whose name says more
_SPEAKING = ("name", "flavor", "recipe_name", "dataset")  # keys whose values say enough


def job_name(config: JobConfig, continued: str | None = None) -> str:
    """Return the name of the run: ``job.name``; else the name of its file, with the options of the command line.

    A run that begins with the ``config.toml`` of another one, which has a name, adds its own options to that.

    Args:
        continued: the name of the run that this continues, if it does.
    """
    inherited = config.run_config is not None and config.origin("job.name").startswith(str(config.run_config))
    if config.job.name and not inherited:
        return config.job.name
    if continued:
        return continued
    file = PurePath(config.job.config_file or "").stem
    if file in ("", "config"):  # config.toml of a run without a name
        file = f"{config.model.name}_{config.model.flavor}"
    options = options_of(type(config))  # type: ignore[arg-type]
    given = [
        part
        for section, keys in options.items()
        for option in keys.values()
        if (section not in OUTSIDE | {"validation"} or option.name == "checkpoint.initial_load_path")
        and config.origin(option.name).startswith("the argument")
        and (part := _part(option, config.value(option.name)))
    ]
    added = _plain("".join(f"-{part}" for part in given))[:_LONGEST]
    return (_plain(config.job.name or file)[: max(_LONGEST - len(added), 10)] + added)[:_LONGEST].strip("._-") or "run"


def _part(option: Option, value: Any) -> str:
    """Return an option for a name: ``lr=0.001``, ``compile``, or the value alone where it says enough."""
    if isinstance(value, bool):
        return option.key if value else f"no_{option.key}"
    if isinstance(value, list):
        return "+".join(map(str, value))
    if option.is_path:
        parts = PurePath(value or "").parts
        return next((part for part in reversed(parts) if not _INNER.fullmatch(part)), "".join(parts[-1:]))
    return f"{value}" if option.key in _SPEAKING else f"{option.key}={value}"


def _plain(name: str) -> str:
    """Return ``name`` with the characters that a folder's name may have everywhere."""
    return re.sub(r"[^\w.+=-]+", "_", name)


# Options that are shown for each run, though a run may have their defaults.
_ALWAYS = (
    "model.name",
    "model.flavor",
    "model.converters",
    "optimizer.lr",
    "training.steps",
    "training.seq_len",
    "training.local_batch_size",
    "training.global_batch_size",
    "training.seed",
)


def distinguishing_options(config: JobConfig) -> dict[str, Any]:
    """Return the options that tell runs apart, by ``section.key``: those without their default, and a few others."""
    options = options_of(type(config))  # type: ignore[arg-type]
    values = {
        option.name: config.value(option.name)
        for section, keys in options.items()
        for option in keys.values()
        if section not in OUTSIDE and (option.name in _ALWAYS or config.value(option.name) != option.default)
    }
    return {name: value for name, value in values.items() if value is not None}
