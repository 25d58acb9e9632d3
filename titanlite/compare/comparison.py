"""Compare runs with a baseline: differences, their intervals, and a verdict in one sentence for each run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from titanlite.compare.alike import (
    cautions,
    differing_options,
    name_apart,
    other_ends,
    other_validation,
    why_not_comparable,
)
from titanlite.compare.interval import MIN_ROWS, Interval, mean_interval
from titanlite.compare.rows import Array, Columns
from titanlite.compare.runs import Run, read_runs
from titanlite.errors import ConfigError
from titanlite.metrics.last_part import last_part
from titanlite.registry import nearest

Verdict = Literal["lower", "higher", "within the noise", "not comparable", "too few rows", "diverged"]


class Pairs(NamedTuple):
    """The values of two runs at the same places (steps, or tokens), (pairs,) each."""

    places: Array
    ours: Array
    theirs: Array


@dataclass(frozen=True)
class Difference:
    """The difference of a metric of ``run`` from that of ``baseline``, at the end of what both have.

    Attributes:
        at: the pairs are at equal "steps", or at equal "tokens".
        difference: the mean of run - baseline, in the metric's unit; ``low`` and ``high`` are its 95% interval. With
            too few pairs they are None, and the difference is that of the last pair.
        difference_percent: the same in percent of the baseline's mean, with its interval.
        rows: the pairs that the mean is over; ``first`` and ``last`` are their places.
        verdict: "lower" and "higher" if the interval excludes 0; "diverged" if one of the runs ended without a finite
            loss, and the difference is of the time before.
    """

    run: str
    baseline: str
    metric: str
    at: Literal["steps", "tokens"]
    difference: float
    low: float | None
    high: float | None
    difference_percent: float
    low_percent: float | None
    high_percent: float | None
    rows: int
    first: float
    last: float
    verdict: Verdict


@dataclass
class Comparison:
    """Runs, and how each differs from the baseline, which is one of them.

    Attributes:
        options: those that are not the same in all runs, each with the value in every one.
        verdicts: a sentence for each run that is not the baseline, by its name.
        reasons: why a run and the baseline do not compare, by the name of the run; empty if they do.
        notes: sentences on runs that were left out, or are not there.
        last_share: the share of the steps of each run that its final loss is the mean of. It is the same for all runs,
            so that those that log every step and those that log every tenth are compared over the same steps.
    """

    runs: list[Run]
    baseline: Run
    options: dict[str, list[str]]
    differences: list[Difference]
    reasons: dict[str, list[str]]
    verdicts: dict[str, str]
    notes: list[str]
    last_share: float

    def difference(self, run: Run, metric: str, at: str = "steps") -> Difference | None:
        return next((d for d in self.differences if (d.run, d.metric, d.at) == (run.name, metric, at)), None)

    def json(self) -> str:
        """Return the comparison as one JSON object; unknown numbers are null."""
        runs = [run_summary(run, self.last_share) | {"baseline": run is self.baseline} for run in self.runs]
        for number, summary in enumerate(runs):
            summary["options"] = {name: texts[number] for name, texts in self.options.items()}
        differences = [asdict(difference) for difference in self.differences]
        texts = {"verdicts": self.verdicts, "not_comparable": self.reasons, "notes": self.notes}
        return json.dumps({"runs": runs, "differences": differences, **texts}, indent=2, allow_nan=False)


def run_summary(run: Run, last_share: float) -> dict[str, Any]:
    """Return the numbers of one run, by name; None where one is not known."""
    skipped = run.last("skipped_steps")
    return {
        "run": run.name,
        "path": str(run.path),
        "steps": run.steps,
        "tokens": run.last("tokens_seen"),
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
        ConfigError: there is no run at a path, or no such baseline.
    """
    runs, notes = read_runs(paths)
    chosen = runs[0]
    if baseline is not None:
        named = [run for run in runs if baseline in (run.name, str(run.path))]
        if not named and Path(baseline).exists():
            (*_, before), _ = read_runs([Path(baseline)])
            named = [run for run in runs if run.path.samefile(before.path)] or [before]
            runs = runs if named[0] in runs else [before, *runs]
        if len(named) != 1:
            names = [run.name for run in runs]
            why = f"must be the name or the path of one of the runs{nearest(baseline, names)}: {', '.join(names)}"
            raise ConfigError(why, key="--baseline", value=baseline)
        chosen = named[0]
    name_apart(runs)
    others = [run for run in runs if run is not chosen]
    reasons = {run.name: reason for run in others if (reason := why_not_comparable(run, chosen))}
    differences = [d for run in others for d in _differences(run, chosen, run.name in reasons)]
    verdicts = {run.name: _sentence(run, chosen, differences, reasons.get(run.name, [])) for run in others}
    last_share = max(run.last_share() for run in runs)
    notes += _of_one(chosen) if not others else []
    return Comparison(runs, chosen, differing_options(runs), differences, reasons, verdicts, notes, last_share)


def _of_one(run: Run) -> list[str]:
    """Return what there is to say of a run that is compared with none."""
    step = run.diverged_at()
    diverged = [] if step is None else [f"There is no finite loss in {run.name} from step {step:,} on."]
    return [f"There is one run, {run.name}. Name another one to compare it with.", *diverged]


def _differences(run: Run, baseline: Run, refused: bool) -> list[Difference]:
    pairs = {
        ("loss", "steps"): at_equal_steps(run.metrics, baseline.metrics, "loss"),
        ("loss", "tokens"): at_equal_tokens(run.metrics, baseline.metrics),
        ("validation_loss", "steps"): at_equal_steps(run.validation, baseline.validation, "loss"),
        ("bits_per_byte", "steps"): at_equal_steps(run.validation, baseline.validation, "bits_per_byte"),
    }
    other = bool(other_validation(run, baseline))
    diverged = run.diverged_at() is not None or baseline.diverged_at() is not None
    differences = []
    for (metric, at), both in pairs.items():
        if len(both.places):
            no_verdict: Verdict | None = "not comparable" if refused or (other and metric != "loss") else None
            no_verdict = no_verdict or ("diverged" if diverged else None)
            differences.append(_difference((run.name, baseline.name), (metric, at), both, no_verdict))
    return differences


def at_equal_steps(ours: Columns, theirs: Columns, name: str) -> Pairs:
    """Return the values of the steps that both runs have logged."""
    steps, i, j = np.intersect1d(ours["step"], theirs["step"], assume_unique=True, return_indices=True)
    return _finite(steps, ours[name][i], theirs[name][j])


def at_equal_tokens(ours: Columns, theirs: Columns) -> Pairs:
    """Return the losses at equal numbers of tokens seen. They are those of the run with fewer rows over the tokens that
    both have seen; the other's losses are interpolated between its rows."""
    a, b = (_finite(columns["tokens_seen"], columns["loss"], columns["loss"]) for columns in (ours, theirs))
    if not len(a.places) or not len(b.places):
        return a._replace(places=a.places[:0])
    low, high = max(a.places[0], b.places[0]), min(a.places[-1], b.places[-1])
    places = min((p[(low <= p) & (p <= high)] for p in (a.places, b.places)), key=len)
    return Pairs(places, np.interp(places, a.places, a.ours), np.interp(places, b.places, b.ours))


def _finite(places: Array, ours: Array, theirs: Array) -> Pairs:
    known = np.isfinite(places) & np.isfinite(ours) & np.isfinite(theirs)
    return Pairs(places[known], ours[known], theirs[known])


def _difference(names: tuple[str, str], kind: tuple[str, Any], pairs: Pairs, no_verdict: Verdict | None) -> Difference:
    interval = mean_interval(pairs.ours - pairs.theirs)
    last = slice(-last_part(len(pairs.places)), None)
    low: float | None
    high: float | None
    verdict: Verdict
    if interval is None:
        (mean, low, high), verdict = (float(pairs.ours[-1] - pairs.theirs[-1]), None, None), "too few rows"
        last = slice(-1, None)
    else:
        (mean, low, high), verdict = interval, _verdict(interval)
    scale = 100 / abs(float(pairs.theirs[last].mean()) or 1.0)
    places = pairs.places[last]
    return Difference(
        run=names[0],
        baseline=names[1],
        metric=kind[0],
        at=kind[1],
        difference=mean,
        low=low,
        high=high,
        difference_percent=scale * mean,
        low_percent=None if low is None else scale * low,
        high_percent=None if high is None else scale * high,
        rows=len(places),
        first=float(places[0]),
        last=float(places[-1]),
        verdict=no_verdict or verdict,
    )


def _verdict(interval: Interval) -> Verdict:
    if interval.low <= 0 <= interval.high:
        return "within the noise"
    return "lower" if interval.high < 0 else "higher"


def rounded(value: float, places: int, sign: str = "") -> str:
    """Format a number with ``places`` decimals; a large one, such as the loss of a run that blew up, as 1.23e+09.

    Args:
        sign: "+" shows that of a positive number, too.
    """
    return f"{value:{sign}.{places}f}" if abs(value) < 10_000 else f"{value:{sign}.3g}"


def interval_in_percent(d: Difference, unit: str = "") -> str:
    """Return the interval of a difference that has one: "-0.31% to +0.25%"."""
    assert d.low_percent is not None
    assert d.high_percent is not None
    return f"{rounded(d.low_percent, 2, '+')}{unit} to {rounded(d.high_percent, 2, '+')}{unit}"


def _sentence(run: Run, baseline: Run, differences: Sequence[Difference], reasons: Sequence[str]) -> str:
    pair = f"{run.name} and {baseline.name}"
    if reasons:
        return f"No verdict: {pair} do not compare, because they have {'; '.join(reasons)}."
    if diverged := [
        f"{r.name} from step {step:,} on" for r in (run, baseline) if (step := r.diverged_at()) is not None
    ]:
        return f"No verdict: there is no finite loss in {', and none in '.join(diverged)}."
    named = [d for d in differences if (d.run, d.metric, d.at) == (run.name, "loss", "steps")]
    if not named:
        return f"No verdict: {pair} have logged no step in common; set the same metrics.log_freq."
    (d,) = named
    caution = "".join(f" {sentence}" for sentence in cautions(run, baseline))
    ends = "".join(f" {sentence}" for sentence in other_ends(run, baseline))
    if d.verdict == "too few rows":
        why = f"No verdict: {pair} have fewer than {MIN_ROWS} logged steps in common; train longer, or log more often"
        return f"{why} (metrics.log_freq).{caution}"
    span = f"95% interval {interval_in_percent(d, '%')}, steps {d.first:,.0f} to {d.last:,.0f}"
    size = f"{rounded(abs(d.difference_percent), 2)}%"
    if d.low == d.high == 0:
        text = f"{pair} have the same losses, steps {d.first:,.0f} to {d.last:,.0f}."
    elif d.verdict == "within the noise":
        lower = run.name if d.difference < 0 else baseline.name
        text = f"The losses of {pair} differ by {size}, which is within the noise ({lower} has the lower one; {span})."
    else:
        text = f"{run.name} has a {d.verdict} loss than {baseline.name}, by {size} ({span})."
    return text + ends + caution
