"""A comparison as text for a terminal: verdicts, tables, and curves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from titanlite.compare.comparison import Comparison, run_summary
from titanlite.compare.difference import Difference, at_equal_steps, interval_in_percent, rounded
from titanlite.compare.options import as_text
from titanlite.compare.plot import COLORS, Curve, highest_loss, plot
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
    for sentence in main_sentences(comparison):
        yield Text(sentence, style="bold")
    for sentence in comparison.notes:
        yield Text(sentence)
    yield _names(comparison)
    if comparison.is_of_many:
        yield _ranking(comparison, console.width)
    yield _runs(comparison, console.width)
    if comparison.differences and not comparison.is_of_many:
        yield _differences(comparison, console.width)
    if comparison.options:
        yield _changes(comparison) if comparison.is_of_many else _options(comparison)
    yield _curves(comparison, console)


def main_sentences(comparison: Comparison) -> list[str]:
    """Return the verdicts. Of many runs: that on the lowest loss, those that the table of all does not have, such as on
    the validation of a run without a verdict on training, and each caution once, with the numbers of the runs."""
    if not comparison.is_of_many:
        return [*comparison.verdicts.values()]
    numbers = {run.name: number + 1 for number, run in enumerate(comparison.runs)}
    cautions: dict[str, list[int]] = {}
    texts: list[str] = []
    for name, sentences in comparison.sentences.items():
        if sentences.is_verdict and (sentences.contradicts or not texts):
            texts.append(" ".join(filter(None, (sentences.training, sentences.validation))))
        no_verdict = [] if sentences.is_verdict else [sentences.training, sentences.validation]
        for caution in filter(None, [*no_verdict, *sentences.cautions]):
            cautions.setdefault(caution, []).append(numbers[name])
    return texts + [f"{caution} (Run {', '.join(map(str, which))}.)" for caution, which in cautions.items()]


def _styles(comparison: Comparison) -> list[str]:
    """Return the colour of each run: of many, only of those whose curves are drawn."""
    drawn = comparison.drawn()
    return [COLORS[drawn.index(n) % len(COLORS)] if n in drawn else "" for n in range(len(comparison.runs))]


def _number(comparison: Comparison, number: int) -> Text:
    """Return what a run is called in the tables and, without colours, in the curves."""
    return Text(f"{number + 1}", style=_styles(comparison)[number])


def _names(comparison: Comparison) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column(overflow="fold", ratio=1)
    table.add_column(overflow="fold", style="dim")
    styles = _styles(comparison)
    for number, run in enumerate(comparison.runs):
        is_baseline = run is comparison.baseline and len(comparison.runs) > 1
        path = Text(printable(str(run.path)))
        table.add_row(
            _number(comparison, number), Text(run.name, style=styles[number]), path, "baseline" if is_baseline else ""
        )
    return table


def _titled(title: str, *tables: Table) -> Group:
    """Return tables below a title that may be wider than they are."""
    return Group(Text(title, style="bold"), *tables)


def _table(*columns: str, wrapped: Sequence[str] = ()) -> Table:
    """Return a table without rows.

    Args:
        wrapped: the columns of words, which go on in the next line of a narrow terminal; numbers are never cut.
    """
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for number, column in enumerate(columns):
        if column in wrapped:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right" if number else "left", no_wrap=True, overflow="fold", min_width=1)
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


def _runs(comparison: Comparison, width: int) -> Group:
    titles, cells = numbers_of_runs(comparison)
    rows = [(_number(comparison, number), of_run) for number, of_run in enumerate(cells)]
    return _titled(f"runs ({about_numbers(comparison)})", *_stacked(titles, rows, width))


def _stacked(
    titles: Sequence[str], rows: Sequence[tuple[Text, Sequence[str]]], width: int, wrapped: Sequence[str] = ()
) -> list[Table]:
    """Return one table, or as many as a narrow terminal of ``width`` columns needs.

    Args:
        rows: the title of each row, which every table has, and its cells.
        wrapped: see :func:`_table`.
    """
    shortest = [
        max(len(part) for cell in column for part in (cell.split() if column[0] in wrapped else [cell, ""]))
        for column in zip(titles, *(cells for _, cells in rows), strict=True)
    ]
    room = width - max(2, *(len(title) for title, _ in rows))
    tables: list[list[int]] = [[]]
    for column, size in enumerate(shortest):
        if tables[-1] and sum(shortest[other] + 2 for other in tables[-1]) + size + 2 > room:
            tables.append([])
        tables[-1].append(column)
    shown = []
    for columns in tables:
        table = _table("", *(titles[column] for column in columns), wrapped=wrapped)
        for title, cells in rows:
            table.add_row(title, *(cells[column] for column in columns))
        shown.append(table)
    return shown


def _ranking(comparison: Comparison, width: int) -> Group:
    """Return many runs with their losses and verdicts, the lowest loss first."""
    rows = []
    for number, run in enumerate(comparison.runs):
        loss = run.final_loss(comparison.last_share)
        d = comparison.difference(run, "loss")
        if run is comparison.baseline:
            cells = ["", "", "baseline"]
        else:
            cells = [*difference_cells(d)[1:], d.verdict] if d else ["", "", "no step in common"]
        rows.append((_number(comparison, number), ["" if loss is None else rounded(loss, 4), *cells]))
    title = f"by loss; difference to {comparison.baseline.name} at equal steps, with its 95% interval"
    return _titled(title, *_stacked(["loss", "%", "interval in %", "verdict"], rows, width, ["verdict"]))


def _differences(comparison: Comparison, width: int) -> Group:
    rows = []
    for number, run in enumerate(comparison.runs):
        shown = _number(comparison, number)
        for d in comparison.shown_differences(run):
            metric = Text.assemble(shown, " " * (3 - len(shown)), metric_title(d))
            rows.append((metric, [*difference_cells(d), d.verdict]))
            shown = Text()
    title = f"difference to {comparison.baseline.name}, with its 95% interval"
    return _titled(title, *_stacked(["difference", "%", "interval in %", "verdict"], rows, width, ["verdict"]))


def metric_title(d: Difference) -> str:
    """Return the metric, and at equal steps or tokens: "loss, steps"."""
    names = {"validation_loss": "val loss", "bits_per_byte": "bits/byte"}
    return f"{names.get(d.metric, d.metric)}, {d.at}"


def difference_cells(d: Difference) -> tuple[str, str, str]:
    """Return the difference, the same in percent, and its interval in percent, as text."""
    interval = "none" if d.low is None else interval_in_percent(d)
    return rounded(d.difference, 4, "+"), rounded(d.difference_percent, 2, "+"), interval


def options_as_text(comparison: Comparison) -> dict[str, list[str]]:
    """Return the options that differ, each with its value in every run, as in TOML."""
    return {
        printable(name): [as_text(run, value) for run, value in zip(comparison.runs, values, strict=True)]
        for name, values in comparison.options.items()
    }


def _options(comparison: Comparison) -> Group:
    numbers = [f"{number + 1}" for number in range(len(comparison.runs))]
    table = Table(box=None, pad_edge=False)
    styles = ["", *_styles(comparison)]
    for column, style in zip(["option", *numbers], styles, strict=True):
        table.add_column(column, overflow="fold", header_style=style, min_width=4)
    for name, texts in options_as_text(comparison).items():
        table.add_row(Text(name), *map(Text, texts))
    return _titled("options that differ", table)


def _changes(comparison: Comparison) -> Group:
    """Return for each of many runs the options that are not those of the baseline."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    base = comparison.runs.index(comparison.baseline)
    options = options_as_text(comparison)
    for number, run in enumerate(comparison.runs):
        changed = [f"{name}={texts[number]}" for name, texts in options.items() if texts[number] != texts[base]]
        if changed and run.options:
            table.add_row(_number(comparison, number), Text("  ".join(changed)))
    return _titled("options that are not those of the baseline", table)


def _curves(comparison: Comparison, console: Console) -> Group:
    width = min(console.width, _WIDEST_PLOT)
    colored = console.color_system is not None and not console.no_color and "utf" in console.encoding.lower()
    styles, base = _styles(comparison), comparison.baseline
    runs = [(number, comparison.runs[number]) for number in comparison.drawn()]
    highest = highest_loss(run.metrics["loss"] for _, run in runs)

    def sign(number: int) -> str:
        return "b" if comparison.is_of_many and comparison.runs[number] is base else f"{number + 1}"

    losses = [Curve(run.metrics["step"], run.metrics["loss"], sign(n), styles[n]) for n, run in runs]
    of_many = " (the lowest, and the baseline: b)" if comparison.is_of_many else ""
    plots = [plot(f"loss by step{of_many}", losses, width, 13, colored, highest)]
    curves = []
    for n, run in runs:
        if run is not base:
            pairs = at_equal_steps(run.metrics, base.metrics, "loss")
            curves.append(Curve(pairs.places, pairs.ours - pairs.theirs, sign(n), styles[n]))
    if curves:
        plots += [Text(), plot(f"loss minus that of {base.name}, by step", curves, width, 9, colored)]
    return Group(*plots)
