"""The difference of a metric of two runs, at equal steps or equal tokens, with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from titanlite.compare.alike import why_not_comparable
from titanlite.compare.interval import Interval, mean_interval
from titanlite.compare.rows import Array, Columns
from titanlite.compare.runs import Run
from titanlite.metrics.last_part import last_part

Verdict = Literal["lower", "higher", "within the noise", "not comparable", "too few rows", "diverged"]
At = Literal["steps", "tokens"]
_PLACES: dict[At, str] = {"steps": "step", "tokens": "tokens_seen"}


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
            loss, and the difference is of the time before, also if they do not compare.
    """

    run: str
    baseline: str
    metric: str
    at: At
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


def differences_of(run: Run, baseline: Run) -> list[Difference]:
    """Return the differences of the losses, validation losses and bits per byte; without those that have no pair."""
    diverged = run.diverged_at() is not None or baseline.diverged_at() is not None
    metrics = (
        ("loss", run.metrics, baseline.metrics, "loss"),
        ("validation_loss", run.validation, baseline.validation, "loss"),
        ("bits_per_byte", run.validation, baseline.validation, "bits_per_byte"),
    )
    differences = []
    for metric, ours, theirs, column in metrics:
        no_verdict: Verdict | None = "not comparable" if why_not_comparable(run, baseline, metric) else None
        no_verdict = "diverged" if diverged else no_verdict
        for at in _PLACES:
            pairs = at_equal_steps(ours, theirs, column) if at == "steps" else at_equal_tokens(ours, theirs, column)
            if len(pairs.places):
                differences.append(_difference((run.name, baseline.name), metric, at, pairs, no_verdict))
    return differences


def at_equal_steps(ours: Columns, theirs: Columns, name: str) -> Pairs:
    """Return the values of the steps that both runs have logged."""
    steps, i, j = np.intersect1d(ours["step"], theirs["step"], assume_unique=True, return_indices=True)
    return _finite(steps, ours[name][i], theirs[name][j])


def at_equal_tokens(ours: Columns, theirs: Columns, name: str = "loss") -> Pairs:
    """Return the values at equal numbers of tokens seen. They are those of the run with fewer rows over the tokens that
    both have seen; the other's values are interpolated between its rows."""
    a, b = (_finite(columns["tokens_seen"], columns[name], columns[name]) for columns in (ours, theirs))
    if not len(a.places) or not len(b.places):
        return a._replace(places=a.places[:0])
    low, high = max(a.places[0], b.places[0]), min(a.places[-1], b.places[-1])
    places = min((p[(low <= p) & (p <= high)] for p in (a.places, b.places)), key=len)
    return Pairs(places, np.interp(places, a.places, a.ours), np.interp(places, b.places, b.ours))


def _finite(places: Array, ours: Array, theirs: Array) -> Pairs:
    known = np.isfinite(places) & np.isfinite(ours) & np.isfinite(theirs)
    return Pairs(places[known], ours[known], theirs[known])


def _difference(names: tuple[str, str], metric: str, at: At, pairs: Pairs, no_verdict: Verdict | None) -> Difference:
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
        metric=metric,
        at=at,
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
