"""Curves as text, in braille dots."""

from __future__ import annotations

import itertools
import math

import plotille

from mint_cli.curves import Curve

__all__ = ["drawing"]

_NUM_ROWS = 10
_MAX_ROW_LABELS = 5
_MARGIN = 10
"""Characters left of the frame, for the labels."""
_MIN_WIDTH = 20
_COLUMNS_PER_LABEL = 8
_DOTS_PER_COLUMN = 2
_DOTS_PER_ROW = 4


def drawing(curve: Curve, *, num_columns: int, colors: bool) -> str:
    """A line that says what it is, the curve in a frame, the steps below; never narrower than about 30 columns.

    Few points are joined by a line; many are dots, and the line is their running mean.
    """
    width = max(_MIN_WIDTH, num_columns - _MARGIN - 2)
    first, last = _apart(curve.steps[0], curve.steps[-1])
    low, high = _apart(min(curve.values), max(curve.values))
    canvas = plotille.Canvas(
        width,
        _NUM_ROWS,
        xmin=first,
        xmax=_limit(first, last, width * _DOTS_PER_COLUMN),
        ymin=low,
        ymax=_limit(low, high, _NUM_ROWS * _DOTS_PER_ROW),
    )
    if curve.window:
        for step, value in zip(curve.steps, curve.values, strict=True):
            canvas.point(step, value, color="cyan" if colors else None)
    line = list(zip(curve.steps, curve.running_mean or curve.values, strict=True))
    for (step, value), (next_step, next_value) in itertools.pairwise([line[0], *line]):
        canvas.line(step, value, next_step, next_value, color="green" if colors else None)

    level, levels = _ticks(low, high, most=_MAX_ROW_LABELS)
    labels = {_place(at, low, high, _NUM_ROWS, _DOTS_PER_ROW): _number(at, level) for at in levels}
    legend = f"dots: every step, line: mean of the last {curve.window}" if curve.window else ""
    lines = [f"{curve.label:<{_MARGIN + 2 + width - len(legend)}}{legend}".rstrip()]
    for row, dots in zip(reversed(range(_NUM_ROWS)), canvas.plot(linesep="\n").split("\n"), strict=True):
        lines.append(f"{labels.get(row, ''):>{_MARGIN}} {'┤' if row in labels else '│'}{dots}")
    return "\n".join([*lines, *_step_axis(first, last, width)])


def _step_axis(first: float, last: float, width: int) -> tuple[str, str]:
    """The lower edge of the frame, and the steps below it."""
    edge, labels = ["─"] * width, [" "] * (width + _COLUMNS_PER_LABEL)
    _, steps = _ticks(first, last, most=width // _COLUMNS_PER_LABEL, least=1.0)
    for step in steps:
        column = _place(step, first, last, width, _DOTS_PER_COLUMN)
        edge[column] = "┬"
        label = f"{step:.0f}"
        labels[column : column + len(label)] = label
    return f"{'':{_MARGIN}} └{''.join(edge)}", f"{'step':>{_MARGIN}}  {''.join(labels).rstrip()}"


def _apart(low: float, high: float) -> tuple[float, float]:
    """The range, made wide enough to be drawn where it is a single value."""
    margin = 0.0 if low < high else 0.5 * abs(low) or 0.5
    return low - margin, high + margin


def _limit(low: float, high: float, num_dots: int) -> float:
    """Upper limit of a canvas on which ``high`` is the last dot: what lies on the limit itself is not drawn."""
    return low + (high - low) * num_dots / (num_dots - 1)


def _place(at: float, low: float, high: float, num_cells: int, num_dots: int) -> int:
    """The cell, of ``num_dots`` each, that holds the dot of ``at``."""
    return round((at - low) / (high - low) * (num_cells * num_dots - 1)) // num_dots


def _ticks(low: float, high: float, *, most: int, least: float = 0.0) -> tuple[float, list[float]]:
    """A round distance of at least ``least``, and its multiples in the range, of which there are at most ``most``."""
    exponent = math.floor(math.log10((high - low) / most))
    distances = (factor * 10.0**power for power in itertools.count(exponent) for factor in (1.0, 2.0, 5.0))
    for distance in distances:
        multiples = range(math.ceil(low / distance), math.floor(high / distance) + 1)
        if distance >= least and len(multiples) <= most:
            return distance, [multiple * distance for multiple in multiples]
    raise AssertionError("some distance is large enough")


def _number(value: float, distance: float) -> str:
    """With as many decimals as ticks need to be told apart; short where that would be long."""
    num_decimals = max(0, -math.floor(math.log10(distance)))
    return f"{value:.2e}" if num_decimals > 5 or abs(value) >= 1e7 else f"{value:.{num_decimals}f}"
