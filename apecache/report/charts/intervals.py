"""Draw published and measured differences as inline SVG, a row for each comparison."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from apecache.report.charts.axes import ticks

WIDTH = 720
LEFT = 16
RIGHT = 24
ROW = 38
TOP = 10
BOTTOM = 34
LABEL = 86
"""Characters of a row's name at most; the table has the whole name."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """Hold the published and the measured difference of one comparison; None for a missing one."""

    name: str
    published: float | None
    measured: float | None
    low: float | None
    """Lower end of the measured difference's interval."""
    high: float | None
    verdict: str
    """A word, which also chooses the color."""


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """Hold the rows of a picture."""

    title: str
    unit: str
    """Of all differences."""
    rows: tuple[Row, ...]
    note: str = ""
    """A remark below the picture."""


@dataclass(frozen=True, kw_only=True)
class DrawnRow:
    """Hold the positions of a row in SVG user units; None where nothing is drawn."""

    y: float
    name: str
    verdict: str
    shade: str
    """A class of the style sheet."""
    published: float | None
    measured: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Hold what the template draws, in SVG user units."""

    width: int
    height: int
    bottom: float
    zero: float
    """x of the line of no difference."""
    marks: tuple[tuple[float, str], ...]
    """(x, label) of the axis."""
    rows: tuple[DrawnRow, ...]


SHADES = {"held": "color-2", "broken": "color-1"}


def draw_intervals(picture: Intervals) -> Drawn:
    """Place the rows below each other along one axis."""
    # The axis always has 0, where the line of no difference stands.
    drawable = [0.0]
    for row in picture.rows:
        for value in (row.published, row.measured, row.low, row.high):
            if value is not None and math.isfinite(value):
                drawable.append(value)
    low = min(drawable)
    high = max(drawable)
    marks = ticks(low, high if high > low else low + 1)
    first = marks[0]
    last = marks[-1]

    def x_of(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        share = (value - first) / (last - first)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    bottom = TOP + ROW * len(picture.rows)
    rows = []
    for number, row in enumerate(picture.rows):
        y = TOP + ROW * (number + 0.5)
        rows.append(_draw_row(row, y, x_of))
    return Drawn(
        width=WIDTH,
        height=bottom + BOTTOM,
        bottom=bottom,
        zero=x_of(0.0) or 0.0,
        marks=tuple((x_of(mark) or 0.0, f"{mark:g}") for mark in marks),
        rows=tuple(rows),
    )


def _draw_row(row: Row, y: float, x_of: Callable[[float | None], float | None]) -> DrawnRow:
    name = row.name if len(row.name) <= LABEL else row.name[: LABEL - 1] + "…"
    return DrawnRow(
        y=y,
        name=name,
        verdict=row.verdict,
        shade=SHADES.get(row.verdict, "color-3"),
        published=x_of(row.published),
        measured=x_of(row.measured),
        low=x_of(row.low),
        high=x_of(row.high),
    )
