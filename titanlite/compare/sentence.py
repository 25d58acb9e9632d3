"""The verdict on a run as sentences: on its training loss, on its validation, and on what limits both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from titanlite.compare.alike import cautions, last_rows_without_loss, other_ends, why_not_comparable
from titanlite.compare.difference import Difference, interval_in_percent, rounded
from titanlite.compare.interval import MIN_ROWS
from titanlite.compare.runs import Run

_NOUNS = {"validation_loss": "validation loss", "bits_per_byte": "validation in bits per byte"}

_FEW = 50  # rows, with fewer of which the interval is several times as wide as it need be


@dataclass(frozen=True)
class Sentences:
    """Attributes:
    training: the verdict on the training loss.
    validation: that on the validation; empty if a run has none.
    contradicts: the validation says the opposite of the training loss.
    cautions: what makes them less exact, or leaves them open.
    is_verdict: the sentence on the training loss says which is lower, or that they are alike; not why it cannot.
    """

    training: str
    validation: str = ""
    contradicts: bool = False
    cautions: list[str] = field(default_factory=list)
    is_verdict: bool = False

    def __str__(self) -> str:
        return " ".join(filter(None, (self.training, self.validation, *self.cautions)))


def sentences_on(run: Run, baseline: Run, differences: Sequence[Difference], reasons: Sequence[str]) -> Sentences:
    """Return the sentences on ``run``.

    Args:
        differences: those of the run to the baseline.
        reasons: why their training losses do not compare.
    """
    pair = f"{run.name} and {baseline.name}"
    d = next((d for d in differences if (d.metric, d.at) == ("loss", "steps")), None)
    diverged = [f"{r.name} from step {step:,} on" for r in (run, baseline) if (step := r.diverged_at()) is not None]
    validation, contradicts = ("", False) if diverged else _validation(run, baseline, differences, d)
    ends = [*last_rows_without_loss(run), *last_rows_without_loss(baseline)]
    no_loss = f"there is no finite loss in {', and none in '.join(diverged)}."
    if reasons:
        text = f"No verdict: {pair} do not compare, because they have {'; '.join(reasons)}."
        return Sentences(text, validation, cautions=[*([f"Also, {no_loss}"] if diverged else []), *ends])
    if diverged:
        return Sentences(f"No verdict: {no_loss}", cautions=ends)
    if d is None:
        text = f"No verdict: {pair} have logged no step in common; set the same metrics.log_freq."
        return Sentences(text, validation, cautions=ends)
    ends += cautions(run, baseline)
    if d.verdict == "too few rows":
        why = f"No verdict: {pair} have fewer than {MIN_ROWS} logged steps in common; train longer, or log more often"
        return Sentences(f"{why} (metrics.log_freq).", validation, contradicts, ends)
    ends = [*other_ends(run, baseline), *_few_rows(d), *ends]
    return Sentences(_on_training(run, baseline, d), validation, contradicts, ends, is_verdict=True)


def _few_rows(d: Difference) -> list[str]:
    """Return a sentence if the runs are called alike, and so few rows would hardly show a difference."""
    if d.verdict != "within the noise" or d.low == d.high == 0 or d.rows >= _FEW:
        return []
    logs_every_step = d.last - d.first < d.rows
    advice = "train longer" if logs_every_step else "train longer, or log every step (metrics.log_freq=1)"
    return [f"The interval is wide because it is of {d.rows} logged steps alone; {advice} to see smaller differences."]


def _on_training(run: Run, baseline: Run, d: Difference) -> str:
    if d.low == d.high == 0:
        return f"{run.name} and {baseline.name} have the same losses, steps {d.first:,.0f} to {d.last:,.0f}."
    size, span = _size(d), _span(d)
    if d.verdict == "within the noise":
        lower = run.name if d.difference < 0 else baseline.name
        noise = f"which is within the noise ({lower} has the lower one; {span})"
        return f"The losses of {run.name} and {baseline.name} differ by {size}, {noise}."
    return f"{run.name} has a {d.verdict} loss than {baseline.name}, by {size} ({span})."


def _size(d: Difference) -> str:
    return f"{rounded(abs(d.difference_percent), 2)}%"


def _span(d: Difference) -> str:
    interval = f"95% interval {interval_in_percent(d, '%')}"
    return f"{interval}, {d.at} {d.first:,.0f} to {d.last:,.0f}"


def _validation(
    run: Run, baseline: Run, differences: Sequence[Difference], training: Difference | None
) -> tuple[str, bool]:
    """Return a sentence on the validation losses, or bits per byte where these alone compare; and True if it says the
    opposite of the training loss."""
    if not len(run.validation["step"]) or not len(baseline.validation["step"]):
        return "", False
    # At equal steps; at equal tokens where no step is in common.
    comparable = [d for d in differences if d.metric in _NOUNS and d.verdict != "not comparable"]
    d = next(iter(sorted(comparable, key=lambda d: (d.metric != "validation_loss", d.at != "steps"))), None)
    if d is None:
        reasons = why_not_comparable(run, baseline, "validation_loss")
        return (f"Their validation losses do not compare: {'; '.join(reasons)}." if reasons else ""), False
    noun = _NOUNS[d.metric]
    side = "lower" if d.difference < 0 else "higher"
    trained = training.verdict if training is not None else ""
    contradicts = trained in ("lower", "higher") and trained != side and d.verdict != "within the noise"
    contradicts = contradicts and d.difference != 0
    but = "But the" if contradicts else "The"
    if d.verdict == "within the noise":
        same = d.low == d.high == 0
        return (
            f"The {noun} is the same." if same else f"The {noun} differs by {_size(d)}, within the noise ({_span(d)})."
        ), False
    if d.verdict == "too few rows":
        last = (
            f"{but} last {noun} of {run.name} is {side} by {_size(d)}"
            if d.difference
            else f"The last {noun} is the same"
        )
        return f"{last}; with fewer than {MIN_ROWS} validations in common there is no interval.", contradicts
    too = ", too" if trained == d.verdict else ""
    return f"{but} {noun} of {run.name} is {d.verdict}{too}, by {_size(d)} ({_span(d)}).", contradicts
