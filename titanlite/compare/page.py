"""A comparison as one HTML page, which needs no other file and no network."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from titanlite.compare.comparison import Comparison
from titanlite.compare.rows import Array
from titanlite.compare.runs import Run
from titanlite.compare.text import (
    about_numbers,
    difference_cells,
    main_sentences,
    metric_title,
    numbers_of_runs,
    options_as_text,
)
from titanlite.errors import ConfigError

_TEMPLATE = Path(__file__).with_name("page.html")
_POINTS = 2000  # of a run; a longer one is shown by the means of that many parts


def check_page(file: Path) -> None:
    """Raise ConfigError if the name of ``file`` does not end in .html: it may be a run or a log, where the name of the
    page was forgotten."""
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError("must end in .html", key="--html", value=file)


def write_page(comparison: Comparison, file: Path) -> None:
    """Write the page.

    Raises:
        ConfigError: the file cannot be written.
    """
    try:
        file.write_text(page(comparison), encoding="utf-8", errors="replace")
    except OSError as e:
        raise ConfigError(f"cannot be written: {e.strerror or e}", key="--html", value=file) from None


def page(comparison: Comparison) -> str:
    """Return the page. What comes from the runs, such as names and samples, is text in it, never code or a link."""
    runs = [_curves(run) for run in comparison.runs]
    base = comparison.runs.index(comparison.baseline)
    data = {"runs": runs, "baseline": base, "drawn": comparison.drawn()}
    # "<" could end the script element.
    script = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    samples = "".join(
        f"<div><h3>{number} {_text(run.name)}</h3><pre>{_text(run.sample)}</pre></div>"
        for number, run in enumerate(comparison.runs, 1)
        if run.sample
    )
    parts = {
        "verdicts": _verdicts(comparison) + "".join(f"<p>{_text(note)}</p>" for note in comparison.notes),
        "about": about_numbers(comparison),
        "runs": _runs(comparison),
        "differences": _differences(comparison),
        "options": _options(comparison),
        "samples": f'<div class="pair">{samples}</div>' if samples else "<p>No run has one.</p>",
        "data": script,
    }
    text = _TEMPLATE.read_text(encoding="utf-8")
    before, *rest = text.split("{{")
    pieces = (piece.split("}}", 1) for piece in rest)
    return before + "".join(parts[name] + after for name, after in pieces)


def _verdicts(comparison: Comparison) -> str:
    """Return the verdicts; of many runs the main ones, and all on a click."""
    every = "".join(_verdict(comparison, name) for name in comparison.verdicts)
    if not comparison.is_of_many:
        return every
    main = "".join(f'<p class="no">{_text(sentence)}</p>' for sentence in main_sentences(comparison))
    return f"{main}<details><summary>The verdict on each run</summary>{every}</details>"


def _verdict(comparison: Comparison, name: str) -> str:
    """Return the sentence on a run; the style of its frame says if the loss is lower or higher."""
    verdicts = (d.verdict for d in comparison.differences if (d.run, d.metric, d.at) == (name, "loss", "steps"))
    kind = next((verdict for verdict in verdicts if verdict in ("lower", "higher")), "no")
    return f'<p class="{kind}">{_text(comparison.verdicts[name])}</p>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; the first cell of each row is its title."""
    lines = [f"<tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>"]
    for first, *cells in rows:
        lines.append(f"<tr><th>{_text(first)}</th>{''.join(f'<td>{_text(cell)}</td>' for cell in cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _runs(comparison: Comparison) -> str:
    titles, rows = numbers_of_runs(comparison)
    named = [
        [f"{number + 1} {run.name}" + (" (baseline)" if _is_baseline(comparison, run) else ""), *cells, run.path]
        for number, (run, cells) in enumerate(zip(comparison.runs, rows, strict=True))
    ]
    return _table(["run", *titles, "path"], named)


def _is_baseline(comparison: Comparison, run: Run) -> bool:
    return run is comparison.baseline and len(comparison.runs) > 1


def _differences(comparison: Comparison) -> str:
    head = ["run", "metric", "difference", "%", "95% interval in %", ""]
    shown = (d for run in comparison.runs for d in comparison.shown_differences(run))
    rows = [[d.run, metric_title(d), *difference_cells(d), d.verdict] for d in shown]
    return _table(head, rows) if rows else "<p>They have no step in common.</p>"


def _options(comparison: Comparison) -> str:
    head = ["option", *(f"{number + 1} {run.name}" for number, run in enumerate(comparison.runs))]
    rows = [[name, *texts] for name, texts in options_as_text(comparison).items()]
    return _table(head, rows) if rows else "<p>None, as far as it is known.</p>"


def _curves(run: Run) -> dict[str, Any]:
    names = {"step": "step", "tokens": "tokens_seen", "hours": "hours", "loss": "loss", "tps": "tps"}
    columns = {name: _listed(_shortened(run.metrics[column])) for name, column in names.items()}
    validation = {name: _listed(_shortened(run.validation[name])) for name in ("step", "loss")}
    return {"name": run.name, **columns, "validation": validation}


def _shortened(values: Array) -> Array:
    """Return the means of at most :data:`_POINTS` parts of (rows,) values."""
    if len(values) <= _POINTS:
        return values
    starts = np.linspace(0, len(values), _POINTS, endpoint=False).astype(int)
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(float), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _listed(values: Array) -> list[float | None]:
    return [float(f"{value:.7g}") if np.isfinite(value) else None for value in values]
