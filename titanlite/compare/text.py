"""A comparison as text for a terminal: verdicts, tables, and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from titanlite.compare.comparison import (
    Comparison,
    Difference,
    at_equal_steps,
    interval_in_percent,
    rounded,
    run_summary,
)
from titanlite.compare.plot import COLORS, highest_loss, plot
from titanlite.errors import printable

_WIDEST_PLOT = 120


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print the verdicts, the tables and the curves. Without colours, numbers tell the curves apart."""
    for part in _parts(comparison, console):
        console.print(part)
        console.print()


def duration(hours: float) -> str:
    """Format hours as "1h02m", "3m04s" or "12s"."""
    seconds = round(hours * 3600)
    if seconds >= 3600:
        return f"{seconds // 3600:,}h{seconds // 60 % 60:02}m"
    return f"{seconds // 60}m{seconds % 60:02}s" if seconds >= 60 else f"{seconds}s"


# The columns of the table of runs: title, key of run_summary, format.
_COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps", "steps", "{:,.0f}".format),
    ("loss", "loss", partial(rounded, places=4)),
    ("val loss", "validation_loss", partial(rounded, places=4)),
    ("tok/s/device", "tps", "{:,.0f}".format),
    ("MFU %", "mfu", "{:.1f}".format),
    ("GiB", "memory_gib", "{:.1f}".format),
    ("skipped", "skipped_steps", "{:,.0f}".format),
    ("time", "hours", duration),
)


def _parts(comparison: Comparison, console: Console) -> Iterator[RenderableType]:
    for sentence in comparison.verdicts.values():
        yield Text(sentence, style="bold")
    for sentence in comparison.notes:
        yield Text(sentence)
    yield _names(comparison)
    yield _runs(comparison)
    if comparison.differences:
        yield _differences(comparison)
    if comparison.options:
        yield _options(comparison)
    yield _curves(comparison, console)


def _number(number: int) -> Text:
    """Return what a run is called in the tables and, without colours, in the curves."""
    return Text(f"{number + 1}", style=COLORS[number % len(COLORS)])


def _names(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", style="dim")
    for number, run in enumerate(comparison.runs):
        is_baseline = run is comparison.baseline and len(comparison.runs) > 1
        name = Text(run.name, style=COLORS[number % len(COLORS)])
        table.add_row(_number(number), name, Text(printable(str(run.path))), "baseline" if is_baseline else "")
    return table


def _titled(title: str, table: Table) -> Group:
    """Return a table below a title that may be wider than it."""
    return Group(Text(title, style="bold"), table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def numbers_of_runs(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the titles of what is known of any run, and the cells of each run."""
    summaries = [run_summary(run, comparison.last_share) for run in comparison.runs]
    columns = [column for column in _COLUMNS if any(summary[column[1]] is not None for summary in summaries)]
    rows = [["" if summary[key] is None else form(summary[key]) for _, key, form in columns] for summary in summaries]
    return [title for title, _, _ in columns], rows


def about_numbers(comparison: Comparison) -> str:
    """Return what the numbers of the runs are."""
    return f"loss: mean of the last {comparison.last_share:.0%} of the steps; speed: median"


def _runs(comparison: Comparison) -> Group:
    titles, rows = numbers_of_runs(comparison)
    table = _table("", *titles)
    for number, cells in enumerate(rows):
        table.add_row(_number(number), *cells)
    return _titled(f"runs ({about_numbers(comparison)})", table)


def _differences(comparison: Comparison) -> Group:
    title = f"difference to {comparison.baseline.name} at equal steps and tokens, with its 95% interval"
    table = _table("", "metric", "difference", "%", "interval in %")
    for number, run in enumerate(comparison.runs):
        shown = _number(number)
        for d in (d for d in comparison.differences if d.run == run.name):
            table.add_row(shown, metric_title(d), *difference_cells(d))
            shown = Text()
    return _titled(title, table)


def metric_title(d: Difference) -> str:
    """Return the metric, and at equal steps or tokens: "loss, steps"."""
    names = {"validation_loss": "val loss", "bits_per_byte": "bits/byte"}
    return f"{names.get(d.metric, d.metric)}, {d.at}"


def difference_cells(d: Difference) -> tuple[str, str, str]:
    """Return the difference, the same in percent, and its interval in percent, as text."""
    interval = "none: too few rows" if d.low is None else interval_in_percent(d)
    return rounded(d.difference, 4, "+"), rounded(d.difference_percent, 2, "+"), interval


def _options(comparison: Comparison) -> Group:
    numbers = [f"{number + 1}" for number in range(len(comparison.runs))]
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(["option", *numbers]):
        style = COLORS[(number - 1) % len(COLORS)] if number else ""
        table.add_column(column, overflow="fold", header_style=style, min_width=4)
    for name, texts in comparison.options.items():
        table.add_row(Text(name), *map(Text, texts))
    return _titled("options that differ", table)


def _curves(comparison: Comparison, console: Console) -> Group:
    width = min(console.width, _WIDEST_PLOT)
    colored = console.color_system is not None and not console.no_color and "utf" in console.encoding.lower()
    numbers = [*range(len(comparison.runs))]
    losses = [(run.metrics["step"], run.metrics["loss"]) for run in comparison.runs]
    highest = highest_loss(y for _, y in losses)
    plots = [plot("loss by step", losses, width, 13, colored, numbers, highest)]
    others = [number for number in numbers if comparison.runs[number] is not comparison.baseline]
    if others:
        pairs = [
            at_equal_steps(comparison.runs[number].metrics, comparison.baseline.metrics, "loss") for number in others
        ]
        curves = [(pair.places, pair.ours - pair.theirs) for pair in pairs]
        title = f"loss minus that of {comparison.baseline.name}, by step"
        plots += [Text(), plot(title, curves, width, 9, colored, others)]
    return Group(*plots)
