"""The options that differ between runs, and whether their losses may be compared at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from titanlite.compare.runs import Run, value_of
from titanlite.errors import printable, shown

# Options that change neither what a run computes nor how fast; they say where it wrote, and what about.
_OUTSIDE = ("job.", "metrics.", "profiling.", "sample.", "checkpoint.folder")
UNKNOWN = "not known"


def differing_options(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the options that are not the same in all ``runs``, each with its value in every one, as in TOML."""
    names = sorted({name for run in runs for name in run.options if not name.startswith(_OUTSIDE)})
    values = {name: [_shown(run, name) for run in runs] for name in names}
    return {printable(name): texts for name, texts in values.items() if len({*texts} - {UNKNOWN}) > 1}


def _shown(run: Run, name: str) -> str:
    return printable(shown(value_of(run.options, name))) if run.options else UNKNOWN


def name_apart(runs: Sequence[Run]) -> None:
    """Give runs of the same name other ones: the options that tell them apart, else the paths, are added."""
    differing = differing_options(runs)
    counts = Counter(run.name for run in runs)
    for number, run in enumerate(runs):
        if counts[run.name] > 1 and run.options:
            told = [f"{name.rpartition('.')[2]}={texts[number].strip(chr(34))}" for name, texts in differing.items()]
            run.name = " ".join([run.name, *told[:4]])
    counts = Counter(run.name for run in runs)
    for run in runs:
        if counts[run.name] > 1:
            run.name = f"{run.name} ({run.path})"


def why_not_comparable(run: Run, baseline: Run) -> list[str]:
    """Return the reasons why a difference of the losses does not say which run is better: other text to predict, other
    units that it is cut into, or another number of tokens in a step."""
    differing = [name for name in baseline.facts if name in run.facts and run.facts[name] != baseline.facts[name]]
    if "training.dataset" in differing:  # then all else about the data may differ
        differing = [name for name in differing if not name.startswith(("training.dataset_", "data."))]
    return [f"{_kind(name)} ({_fact(run, name)}, not {_fact(baseline, name)})" for name in differing]


def _kind(name: str) -> str:
    if name in ("tokens per step", "tokenizer"):
        return f"other {name}"
    if name == "model.tokenizer_path":
        return f"other tokenizer: {name}"
    return f"other sequences: {name}" if name == "training.seq_len" else f"other data: {name}"


def _fact(run: Run, name: str) -> str:
    value = run.facts[name]
    return f"{value:,}" if name == "tokens per step" else printable(shown(value))


def not_known(run: Run, baseline: Run) -> list[str]:
    """Return what decides whether two runs compare, and one of them does not say."""
    names = {"training.dataset": "data", "tokens per step": "tokens per step", "tokenizer": "tokenizer"}
    same = all("model.tokenizer_path" in facts for facts in (run.facts, baseline.facts))
    unknown = [word for name, word in names.items() if name not in run.facts or name not in baseline.facts]
    return [word for word in unknown if not (word == "tokenizer" and same)]
