"""Published and measured differences side by side, one row for each comparison. Inline SVG."""

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
"""Characters of a row's name at most; the whole one stands in the table."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison: its published difference, and the measured one with its interval; None where
    there is none. `verdict` is drawn as a colour and said as a word."""

    name: str
    published: float | None
    measured: float | None
    low: float | None
    high: float | None
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """`unit` of all differences; `note`: a remark below the picture."""

    title: str
    unit: str
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class DrawnRow:
    """Places in SVG user units; None where nothing is drawn. `shade` is a class of the style
    sheet."""

    y: float
    name: str
    verdict: str
    shade: str
    published: float | None
    measured: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    width: int
    height: int
    bottom: float
    zero: float
    marks: tuple[tuple[float, str], ...]
    rows: tuple[DrawnRow, ...]


SHADES = {"held": "colour-2", "broken": "colour-1"}


def draw_intervals(picture: Intervals) -> Drawn:
    values = [v for row in picture.rows for v in (row.published, row.measured, row.low, row.high)]
    known = [0.0, *(value for value in values if value is not None and math.isfinite(value))]
    low = min(known)
    high = max(known)
    marks = ticks(low, high if high > low else low + 1)
    first = marks[0]
    last = marks[-1]

    def place(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    bottom = TOP + ROW * len(picture.rows)
    rows = tuple(
        _drawn(row, TOP + ROW * (number + 0.5), place) for number, row in enumerate(picture.rows)
    )
    labels = tuple((place(mark) or 0.0, f"{mark:g}") for mark in marks)
    return Drawn(
        width=WIDTH,
        height=bottom + BOTTOM,
        bottom=bottom,
        zero=place(0.0) or 0.0,
        marks=labels,
        rows=rows,
    )


def _drawn(row: Row, y: float, place: Callable[[float | None], float | None]) -> DrawnRow:
    placed = [place(value) for value in (row.published, row.measured, row.low, row.high)]
    name = row.name if len(row.name) <= LABEL else row.name[: LABEL - 1] + "…"
    return DrawnRow(y, name, row.verdict, SHADES.get(row.verdict, "colour-3"), *placed)
