"""The options that differ between runs, and whether their losses may be compared at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from titanlite.compare.runs import HELD_OUT, Run, value_of
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


def other_validation(run: Run, baseline: Run) -> list[str]:
    """Return the options by which the validation losses of two runs are of different text."""
    ours, theirs = run.validation_facts, baseline.validation_facts
    return [name for name in theirs if name in ours and ours[name] != theirs[name]]


def cautions(run: Run, baseline: Run) -> list[str]:
    """Return sentences on what makes a comparison of two runs less exact, or leaves it open."""
    sentences = []
    if unknown := not_known(run, baseline):
        sentences.append(f"It is not known if they have the same {', '.join(unknown)}.")
    ours, theirs = (r.validation_facts.get(HELD_OUT) for r in (run, baseline))
    if None not in (ours, theirs) and ours != theirs:
        sentences.append("They hold out other documents for validation, so their batches differ.")
    if (names := other_validation(run, baseline)) and len(run.validation["step"]) and len(baseline.validation["step"]):
        sentences.append(f"Their validation losses do not compare: other {', '.join(names)}.")
    return sentences


def other_ends(run: Run, baseline: Run) -> list[str]:
    """Return a sentence if one run is clearly longer than the other: then the difference is not that of their ends."""
    shorter, longer = sorted((run, baseline), key=lambda r: r.steps)
    if shorter.steps >= 0.9 * longer.steps:
        return []
    ends = f"{shorter.name} ends at step {shorter.steps:,}, and {longer.name} at step {longer.steps:,}"
    return [f"{ends}: this is about the steps that both have, not about their ends."]


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
