"""The name of a run, for people who look at several: ``job.name``, or what distinguishes it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from titanlite.config.options import Option, options_of
from titanlite.config.run_config import run_config_of, section_in
from titanlite.config.schema import JobConfig

# The sections that change neither what a run computes nor how fast.
OUTSIDE = {"job", "profiling", "metrics", "sample", "checkpoint", "comm", "memory_estimation"}
_LONGEST = 100  # characters
_INNER = re.compile(r"model|checkpoint|step-\d+")  # folders in that of a run, whose name says more
_SPEAKING = ("name", "flavor", "recipe_name", "dataset")  # keys whose values say enough


def job_name(config: JobConfig, continued: str | None = None, earlier: Iterable[Mapping[str, Any]] = ()) -> str:
    """Return the name of the run: ``job.name``; else the name of its file, with the options of the command line. If an
    earlier run has that name and other options, as after an edit of the file, those are added too.

    A run that begins with the ``config.toml`` of another one, which has a name, adds its own options to that.

    Args:
        continued: the name of the run that this continues, if it does.
        earlier: the configurations of other runs that are looked at together with this one, as of
            :func:`~titanlite.config.run_config.read_run_config`.
    """
    inherited = config.run_config is not None and config.origin("job.name").startswith(str(config.run_config))
    if config.job.name and not inherited:
        return config.job.name
    if continued:
        return continued
    file = PurePath(config.job.config_file or "").stem
    if file in ("", "config"):  # config.toml of a run without a name
        file = f"{config.model.name}_{config.model.flavor}"
    options = {option.name: option for option in _of_results(config)}
    given = [name for name in options if config.origin(name).startswith("the argument")]
    name = _joined(config, file, [_part(options[key], config.value(key)) for key in given])
    current, others = run_config_of(config, Path(config.job.dump_folder).expanduser()), [*earlier]
    same = [run for run in others if _name_in(run) == name]
    edited = [key for key, option in options.items() if any(_differs(current, option, run) for run in same)]
    parts = [
        _part(option, config.value(key)) or (_changed_part(option, config.value(key)) if key in edited else "")
        for key, option in options.items()
        if key in {*given, *edited}
    ]
    name, number = _joined(config, file, parts), 1
    # An earlier edit can have left another run of this name.
    while any(
        _name_in(run) == _numbered(name, number) and any(_differs(current, option, run) for option in options.values())
        for run in others
    ):
        number += 1
    return _numbered(name, number)


def _name_in(run: Mapping[str, Any]) -> Any:
    return section_in(run, "job").get("name")


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name[: _LONGEST - 4]}-{number}"


def is_choice(name: str) -> bool:
    """Return whether an option says what "auto" has chosen, and why."""
    return name == "activation_checkpoint.chosen" or name.endswith("_chosen")


def without_reason(name: str, value: Any) -> Any:
    """Return the value of an option; of one that says what "auto" has chosen and why, only what."""
    return value.partition(": ")[0] if is_choice(name) and isinstance(value, str) else value


def _of_results(config: JobConfig) -> list[Option]:
    """Return the options that can change what a run computes, or how fast."""
    options = options_of(type(config))  # type: ignore[arg-type]
    return [
        option
        for section, keys in options.items()
        for option in keys.values()
        if (section not in OUTSIDE | {"validation"} and not is_choice(option.name))
        or option.name == "checkpoint.initial_load_path"
    ]


def _differs(current: Mapping[str, Any], option: Option, run: Mapping[str, Any]) -> bool:
    """Return whether a run has another value of an option than ``current``, as their files have them. The file of a run
    has the seed that was drawn where none was given, and the mode that "auto" chose."""
    if not (before := section_in(run, option.section)):
        return False
    value = section_in(current, option.section).get(option.key)
    if value == "auto" or (value is None and option.key == "seed"):
        return False
    return bool(before.get(option.key, option.default) != value)


def _joined(config: JobConfig, file: str, parts: Iterable[str]) -> str:
    added = _plain("".join(f"-{part}" for part in parts if part))[:_LONGEST]
    return (_plain(config.job.name or file)[: max(_LONGEST - len(added), 10)] + added)[:_LONGEST].strip("._-") or "run"


def _changed_part(option: Option, value: Any) -> str:
    """Return an option for a name that has no value any more."""
    return f"{option.key}=default" if value is None else f"no_{option.key}"


def _part(option: Option, value: Any) -> str:
    """Return an option for a name: ``lr=0.001``, ``compile``, or the value alone where it says enough."""
    if value is None:
        return ""
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
        option.name: without_reason(option.name, config.value(option.name))
        for section, keys in options.items()
        for option in keys.values()
        if section not in OUTSIDE and (option.name in _ALWAYS or config.value(option.name) != option.default)
    }
    return {name: value for name, value in values.items() if value is not None}
