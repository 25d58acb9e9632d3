"""The options that differ between runs, and names that tell runs apart by them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from titanlite.compare.facts import value_of
from titanlite.compare.runs import Run
from titanlite.config.job_name import OUTSIDE
from titanlite.errors import printable, shown

# Options of the sections that change neither what a run computes nor how fast, which do.
_INSIDE = (
    "checkpoint.initial_load_path",
    "checkpoint.initial_load_model_weights_only",
    "checkpoint.exclude_from_loading",
)
# What changes only the speed, or what is measured: it tells runs apart where nothing else does.
_NOT_RESULTS = (
    *("activation_checkpoint.", "compile.", "experimental.", "parallelism.", "validation."),
    *("training.compile", "training.gc_", "training.enable_cpu_offload"),
)
_MOST_IN_A_NAME = 4
UNKNOWN = "not known"


def differing_options(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the options that are not the same in all ``runs`` whose configuration is known, each with its value in
    every run; None where it is unset, or the configuration is not known."""
    known = [run for run in runs if run.options]
    names = sorted({name for run in known for name in run.options if name in _INSIDE or _section(name) not in OUTSIDE})
    values = {name: [value_of(run.options, name) if run.options else None for run in runs] for name in names}
    return {name: all_ for name, all_ in values.items() if len({shown(value_of(r.options, name)) for r in known}) > 1}


def _section(name: str) -> str:
    return name.partition(".")[0]


def as_text(run: Run, value: Any) -> str:
    """Return the value of an option of a run as in TOML."""
    return printable(shown(value)) if run.options else UNKNOWN


def as_json(value: Any) -> Any:
    """Return a value of TOML as one that JSON has."""
    if isinstance(value, list):
        return [as_json(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def name_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name other ones: the options that tell them apart are added, else the paths. Options that
    change the losses come first."""
    names = [run.name for run in runs]
    for name, count in Counter(names).items():
        group = [run for run, its in zip(runs, names, strict=True) if its == name and run.options]
        differing = differing_options(group) if count > 1 else {}
        first = sorted(differing, key=lambda option: option.startswith(_NOT_RESULTS))[:_MOST_IN_A_NAME]
        for number, run in enumerate(group):
            told = [f"{option.rpartition('.')[2]}={_short(run, differing[option][number])}" for option in first]
            run.name = " ".join([run.name, *map(printable, told)])
    counts = Counter(run.name for run in runs)
    for run in runs:
        if counts[run.name] > 1:
            run.name = f"{run.name} ({run.path})"


def _short(run: Run, value: Any) -> str:
    return as_text(run, value).strip('"')
