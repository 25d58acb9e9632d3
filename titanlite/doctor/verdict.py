"""Which number format and which mode a machine should train in, from what was measured on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from titanlite.doctor.probe import BASE, GAINS

Row = dict[str, Any]


@dataclass
class Verdict:
    """The fastest way to train the configured model here, of those that were measured.

    Attributes:
        options: the options to add, as ``section.key`` -> value on the command line.
        gain: how much faster a step is than in high precision, in the faster mode of each; None: no step was measured.
        reasons: sentences, one for each format.
    """

    options: dict[str, str] = field(default_factory=dict)
    gain: float | None = None
    reasons: list[str] = field(default_factory=list)


def decide(rows: Sequence[Row], compile_asked: bool) -> Verdict:
    """Return the verdict on the rows that :mod:`titanlite.doctor.probe` printed."""
    verdict = Verdict()
    steps = {(row["format"], row["compiled"]): row for row in rows if row["kind"] == "step"}
    formats = list(dict.fromkeys(row["format"] for row in rows if row["kind"] == "layer" and row["format"] != BASE))
    for row in rows:
        if row["kind"] == "refused":
            verdict.reasons.append(f"{row['format']} cannot be used: {row['why']}")
    for name in formats:
        verdict.reasons.append(_reason(name, rows, steps))
    base = min((row for (name, _), row in steps.items() if name == BASE), key=lambda row: row["ms"], default=None)
    if base is None:
        return verdict
    # Two modes are measured one after the other, formats in turn: a format counts by its ratio in its own mode.
    candidates = [
        (row["speedup"] * base["ms"] / steps[BASE, row["compiled"]]["ms"], row)
        for (name, _), row in steps.items()
        if name != BASE and row["speedup"] >= GAINS
    ]
    gain, best = max(candidates, key=lambda pair: pair[0], default=(1.0, base))
    if gain < GAINS:
        gain, best = 1.0, base
    verdict.gain = gain
    if best["compiled"] != compile_asked:
        verdict.options["training.compile"] = str(best["compiled"]).lower()
    if best["format"] != BASE:
        verdict.options["model.converters"] = best["format"]
        if best["filter_fqns"]:
            verdict.options[f"{best['format']}.filter_fqns"] = ",".join(best["filter_fqns"])
    return verdict


def _reason(name: str, rows: Sequence[Row], steps: dict[tuple[str, bool], Row]) -> str:
    layers = [row for row in rows if row["kind"] == "layer" and row["format"] == name]
    if layers[0]["emulated"]:
        return (
            f"{name} is emulated here, without units for it: {_times(layers[0]['speedup'])} of high precision's speed"
        )
    parts = []
    for compiled in (False, True):
        mode = "compiled" if compiled else "eager"
        mode_layers = [row for row in layers if row["compiled"] == compiled]
        if mode_layers:
            gaining = [row["layer"] for row in mode_layers if row["speedup"] >= GAINS]
            ratios = [row["speedup"] for row in mode_layers]
            span = f"layers {_times(min(ratios))} to {_times(max(ratios))}"
            parts.append(f"{mode}: {span}" + (f", faster are {', '.join(gaining)}" if gaining else ", none is faster"))
        if step := steps.get((name, compiled)):
            parts.append(f"steps {_times(step['speedup'])}")
    gains = any(row["speedup"] >= GAINS for (format, _), row in steps.items() if format == name)
    known = any(format == name for format, _ in steps)
    ending = "it gains" if gains else "it will not gain" if known else "no step was measured"
    return f"{name} has units here; {'; '.join(parts)}: {ending}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x"
