"""Compare runs with a baseline: differences, their intervals, and a verdict in sentences for each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from titanlite.compare.alike import why_not_comparable
from titanlite.compare.difference import Difference, differences_of
from titanlite.compare.options import as_json, differing_options, name_apart
from titanlite.compare.runs import Run, read_runs
from titanlite.compare.sentence import Sentences, sentences_on
from titanlite.config.run_config import CONFIG
from titanlite.errors import ConfigError, printable
from titanlite.registry import nearest

MANY = 5  # runs, from which on they are sorted by their loss, and not all are drawn
_DRAWN = 5  # of many runs, beside the baseline


@dataclass
class Comparison:
    """Runs, and how each differs from the baseline, which is one of them.

    Attributes:
        runs: in the order in which they were named; from :data:`MANY` on by ascending loss.
        options: those that are not the same in all runs, each with the value in every one.
        sentences: the verdict on each run that is not the baseline, by its name.
        reasons: why the losses of a run and the baseline do not compare, by the name of the run; only if they do not.
        notes: sentences on runs that were left out, or are not there.
        last_share: the share of the steps of each run that its final loss is the mean of. It is the same for all runs,
            so that those that log every step and those that log every tenth are compared over the same steps.
    """

    runs: list[Run]
    baseline: Run
    options: dict[str, list[Any]]
    differences: list[Difference]
    reasons: dict[str, list[str]]
    sentences: dict[str, Sentences]
    notes: list[str]
    last_share: float

    @property
    def verdicts(self) -> dict[str, str]:
        """The sentences as one text for each run."""
        return {name: str(sentences) for name, sentences in self.sentences.items()}

    @property
    def is_of_many(self) -> bool:
        return len(self.runs) >= MANY

    def drawn(self) -> list[int]:
        """Return the numbers of the runs whose curves are drawn, from 0: of many, those with the lowest losses, and the
        baseline."""
        numbers = range(len(self.runs))
        if not self.is_of_many:
            return [*numbers]
        return [number for number in numbers if number < _DRAWN or self.runs[number] is self.baseline]

    def difference(self, run: Run, metric: str, at: str = "steps") -> Difference | None:
        return next((d for d in self.differences if (d.run, d.metric, d.at) == (run.name, metric, at)), None)

    def shown_differences(self, run: Run) -> list[Difference]:
        """Return the differences of a run without those at equal tokens where these are those at equal steps."""
        same = run.facts.get("tokens per step") == self.baseline.facts.get("tokens per step") is not None
        return [d for d in self.differences if d.run == run.name and not (same and d.at == "tokens")]

    def json(self) -> str:
        """Return the comparison as one JSON object; unknown numbers are null."""
        runs = [run_summary(run, self.last_share) | {"baseline": run is self.baseline} for run in self.runs]
        for number, (run, summary) in enumerate(zip(self.runs, runs, strict=True)):
            values = {name: as_json(values[number]) for name, values in self.options.items()}
            summary["options"] = values if run.options else {}
        content = {
            "runs": runs,
            "differences": [asdict(difference) for difference in self.differences],
            "verdicts": self.verdicts,
            "not_comparable": self.reasons,
            "notes": self.notes,
            "last_share": self.last_share,
        }
        return json.dumps(content, indent=2, allow_nan=False)


def run_summary(run: Run, last_share: float) -> dict[str, Any]:
    """Return the numbers of one run, by name; None where one is not known."""
    skipped = run.last("skipped_steps")
    tokens = run.last("tokens_seen")
    return {
        "run": run.name,
        "path": str(run.path),
        "steps": run.steps,
        "tokens": None if tokens is None else int(tokens),
        "loss": run.final_loss(last_share),
        "validation_loss": run.last_validation("loss"),
        "bits_per_byte": run.last_validation("bits_per_byte"),
        "tps": run.median("tps"),
        "mfu": run.median("mfu"),
        "memory_gib": run.peak_memory(),
        "skipped_steps": None if skipped is None else int(skipped),
        "hours": run.last("hours"),
    }


def compare(paths: Sequence[Path], baseline: str | None = None) -> Comparison:
    """Compare the runs at ``paths``; see :func:`titanlite.compare.runs.read_runs`.

    Args:
        baseline: the path or the name of the run that others are compared with; None: the first.

    Raises:
        ConfigError: there is no run at a path, no such baseline, or several.
    """
    runs, notes = read_runs(paths)
    runs, chosen = _with_baseline(runs, baseline)
    last_share = max(run.last_share() for run in runs)
    if len(runs) >= MANY:
        losses = {id(run): loss for run in runs if (loss := run.final_loss(last_share)) is not None}
        runs = sorted(runs, key=lambda run: losses.get(id(run), float("inf")))
    others = [run for run in runs if run is not chosen]
    reasons = {run.name: reason for run in others if (reason := why_not_comparable(run, chosen))}
    by_run = {run.name: differences_of(run, chosen) for run in others}
    sentences = {run.name: sentences_on(run, chosen, by_run[run.name], reasons.get(run.name, [])) for run in others}
    notes += _without_options(runs)
    notes += _of_one(chosen) if not others else []
    differences = [d for of_run in by_run.values() for d in of_run]
    return Comparison(runs, chosen, differing_options(runs), differences, reasons, sentences, notes, last_share)


def _with_baseline(runs: list[Run], baseline: str | None) -> tuple[list[Run], Run]:
    """Give the runs different names, and find the baseline by its name, as it was before or is now, or by its path; one
    that is not among the runs becomes the first of them."""
    before = {id(run): run.name for run in runs}
    chosen: Run | None = runs[0]
    if baseline is not None:
        chosen = None
        if all(baseline not in (run.name, str(run.path)) for run in runs) and Path(baseline).exists():
            read = _only_run(baseline)
            chosen = next((run for run in runs if run.path.samefile(read.path)), read)
            runs = runs if any(run is chosen for run in runs) else [chosen, *runs]
    name_apart(runs)
    if chosen is None:
        named = [run for run in runs if baseline in (run.name, str(run.path))]
        named = named or [run for run in runs if baseline == before[id(run)]]
        if len(named) != 1:
            names = [run.name for run in named or runs]
            hint = "" if named else nearest(f"{baseline}", names)
            why = f"must be the name or the path of one of the runs{hint}: {', '.join(names)}"
            raise ConfigError(why, key="--baseline", value=baseline)
        (chosen,) = named
    return runs, chosen


def _only_run(baseline: str) -> Run:
    """Return the run at a path; that in the folder itself, not the earlier ones in it."""
    runs, _ = read_runs([Path(baseline)])
    places = [Path(baseline), *([Path(baseline).parent] if Path(baseline).is_file() else [])]
    itself = [run for run in runs if any(run.path.samefile(place) for place in places)]
    if len(itself or runs) != 1:
        paths = ", ".join(str(run.path) for run in runs)
        raise ConfigError(f"holds {len(runs)} runs, and one must be named: {paths}", key="--baseline", value=baseline)
    return (itself or runs)[0]


def _without_options(runs: Sequence[Run]) -> list[str]:
    """Return a sentence for each run folder whose configuration is lost: its options are missing in the tables."""
    lost = [run for run in runs if run.path.is_dir() and not run.options]
    return [
        f"The options of {run.name} are not known: {printable(str(run.path / CONFIG))} is not there, or is no TOML."
        for run in lost
    ]


def _of_one(run: Run) -> list[str]:
    """Return what there is to say of a run that is compared with none."""
    step = run.diverged_at()
    diverged = [] if step is None else [f"There is no finite loss in {run.name} from step {step:,} on."]
    return [f"There is one run, {run.name}. Name another one to compare it with.", *diverged]
