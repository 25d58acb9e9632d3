"""Curves in a terminal: dots of Braille characters in colour, or the number of each run where there is no colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from rich.text import Text

from titanlite.compare.rows import Array

# In the order of the runs; each can be read on a dark and on a light background.
COLORS = ("cyan", "magenta", "yellow", "green", "red", "blue")
_FEWEST_COLUMNS = 8  # of a curve; a line of a narrower terminal is broken
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a character, by row and column


class Curve(NamedTuple):
    """Attributes:
    x, y: (rows,) each.
    sign: the character that draws it without colours.
    color: of :data:`COLORS`.
    """

    x: Array
    y: Array
    sign: str
    color: str


def binned(x: Array, y: Array, start: float, end: float, bins: int) -> tuple[Array, Array]:
    """Return the mean of ``x`` and of ``y`` in each of ``bins`` equal parts of ``start`` to ``end`` that has points."""
    known = np.isfinite(x) & np.isfinite(y) & (x >= start) & (x <= end)
    x, y = x[known], y[known]
    place = np.minimum(((x - start) / ((end - start) or 1.0) * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    sums = (np.bincount(place, weights=values, minlength=bins) for values in (x, y))
    mean_x, mean_y = (total[count > 0] / count[count > 0] for total in sums)
    return mean_x, mean_y


def highest_loss(losses: Iterable[Array]) -> float:
    """Return the highest loss to draw of curves of (rows,) losses: one and a half times the highest that a run begins
    with. A run that diverges leaves the frame there, and the others can still be told apart."""
    begins = [y[np.isfinite(y)][:1] for y in losses]
    return 1.5 * max((float(y[0]) for y in begins if len(y)), default=math.inf)


def plot(
    title: str, curves: Sequence[Curve], width: int, height: int, colored: bool, highest: float = math.inf
) -> Text:
    """Draw curves into ``width`` columns and ``height`` lines, with a scale at the left and below.

    Args:
        curves: those without a finite value are left out.
        highest: what lies above is not drawn.
    """
    curves = [
        curve._replace(x=curve.x[known], y=curve.y[known]) for curve in curves for known in [np.isfinite(curve.y)]
    ]
    filled = [curve.x for curve in curves if len(curve.x)]
    if not filled:
        return Text(f"{title}: no values")
    start, end = min(x[0] for x in filled), max(x[-1] for x in filled)
    columns = max(width - 11, _FEWEST_COLUMNS)
    per_column = 2 if colored else 1
    means = [binned(curve.x, curve.y, start, end, columns * per_column) for curve in curves]
    low, high = _scale(means, start + 0.05 * (end - start), highest)
    rows = height * (4 if colored else 1)
    signs = np.zeros((height, columns), dtype=int)
    owners = np.full((height, columns), -1)
    for number, (x, y) in enumerate(means):
        for column, row in _points(x, y, start, end, columns * per_column, low, high, rows):
            cell = (row // 4, column // 2) if colored else (row, column)
            signs[cell] |= _DOTS[row % 4][column % 2] if colored else 1
            owners[cell] = number
    decimals = max(0, min(6, 2 - math.floor(math.log10(high - low))))
    text = Text.assemble((f"{title}\n", "bold"))
    for line in range(height):
        mark = high - (high - low) * line / max(height - 1, 1)
        text.append(f"{mark:>9.{decimals}f} " if line % 3 == 0 or line == height - 1 else " " * 10, style="dim")
        for sign, owner in zip(signs[line], owners[line], strict=True):
            if owner < 0:
                text.append(" ")
            else:
                text.append(chr(0x2800 + sign) if colored else curves[owner].sign, style=curves[owner].color)
        text.append("\n")
    text.append(f"{' ' * 10}{f'{start:,.0f}':<{columns // 2}}{f'{end:,.0f}':>{columns - columns // 2}}", style="dim")
    return text


def _scale(means: Sequence[tuple[Array, Array]], begin: float, highest: float) -> tuple[float, float]:
    """Return the lowest and highest value to draw: all after ``begin``, because the first losses are far above, up to
    ``highest``."""
    values = np.concatenate([y[x >= begin] if (x >= begin).any() else y for x, y in means])
    low, high = float(values.min()), min(float(values.max()), highest)
    around = max(0.5, 0.01 * abs(low))
    return (low, high) if high > low else (low - around, low + around)


def _points(
    x: Array, y: Array, start: float, end: float, columns: int, low: float, high: float, rows: int
) -> list[tuple[int, int]]:
    """Return the (column, row) of the dots of one curve; a line joins neighbours."""
    if not len(x):
        return []
    at = np.arange(columns)
    places = (x - start) / ((end - start) or 1.0) * (columns - 1)
    inside = (at >= np.floor(places[0])) & (at <= np.ceil(places[-1]))
    values = np.interp(at[inside], places, y)
    levels = np.round((high - values) / (high - low) * (rows - 1)).clip(-1, rows).astype(int)
    points = []
    for column, level, before in zip(at[inside], levels, [levels[0], *levels[:-1]], strict=True):
        middle = (level + before) // 2
        for row in {*range(min(level, middle), max(level, middle) + 1)} | {level}:
            if 0 <= row < rows:
                points.append((int(column), int(row)))
    return points
