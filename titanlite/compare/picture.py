"""A comparison as a picture, PNG or SVG."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from titanlite.compare.comparison import Comparison
from titanlite.compare.difference import at_equal_steps
from titanlite.compare.plot import binned, highest_loss
from titanlite.compare.rows import Array
from titanlite.errors import ConfigError

_POINTS = 100  # of a smoothed curve


def check_picture(file: Path) -> None:
    """Raise ConfigError if the name of ``file`` does not end in .png or .svg."""
    if file.suffix.lower() not in (".png", ".svg"):
        raise ConfigError("must end in .png or .svg", key="--picture", value=file)


def write_picture(comparison: Comparison, file: Path) -> None:
    """Write the losses by step, and below them their differences to the baseline; of many runs, the lowest ones.

    Raises:
        ConfigError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [(number, comparison.runs[number]) for number in comparison.drawn()]
    others = [(number, run) for number, run in runs if run is not comparison.baseline]
    figure = Figure(figsize=(9, 7 if others else 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2 if others else 1, sharex=True, height_ratios=[2, 1] if others else None, squeeze=False)
    losses, start = axes[0, 0], []
    for number, run in runs:
        x, y = run.metrics["step"], run.metrics["loss"]
        faint = losses.plot(*_thinned(x, y), linewidth=0.6, alpha=0.25, color=f"C{number}")
        losses.plot(*smoothed(x, y), color=faint[0].get_color(), label=_plain(run.name))
        start.append(y[np.isfinite(y) & (x >= x[0] + 0.05 * (x[-1] - x[0]))])
    if (values := np.concatenate(start)).size:  # the first losses are far above
        highest = highest_loss(run.metrics["loss"] for _, run in runs)
        low, high = float(values.min()), min(float(values.max()), highest)
        high = max(high, low)  # where all have diverged
        margin = 0.05 * (high - low or max(1.0, abs(low)))
        losses.set_ylim(low - margin, high + margin)
    losses.set_ylabel("loss")
    losses.legend(fontsize="small")
    if others:
        for number, run in others:
            pairs = at_equal_steps(run.metrics, comparison.baseline.metrics, "loss")
            axes[1, 0].plot(*smoothed(pairs.places, pairs.ours - pairs.theirs), color=f"C{number}")
        axes[1, 0].axhline(0, color="gray", linewidth=0.8)
        axes[1, 0].set_ylabel(f"loss minus that of\n{_plain(comparison.baseline.name)}")
    axes[-1, 0].set_xlabel("step")
    try:
        figure.savefig(file, format=file.suffix[1:].lower(), dpi=120)
    except OSError as e:
        raise ConfigError(f"cannot be written: {e.strerror or e}", key="--picture", value=file) from None


def _plain(text: str) -> str:
    """Return ``text`` without what matplotlib would read as a formula, or as a label to hide."""
    return text.replace("$", r"\$").lstrip("_") or "run"


def _thinned(x: Array, y: Array) -> tuple[Array, Array]:
    every = max(1, len(x) // 4000)
    return x[::every], y[::every]


def smoothed(x: Array, y: Array) -> tuple[Array, Array]:
    """Return at most :data:`_POINTS` points of a curve: the means of that many equal parts of it; at most a third as
    many as it has rows, so that each is the mean of some."""
    if not len(x):
        return x, y
    return binned(x, y, float(x[0]), float(x[-1]), min(_POINTS, max(len(x) // 3, 1)))
