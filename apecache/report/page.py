"""Render self-contained HTML pages of tables, learning curves and retrieval galleries.

A page holds no script and loads nothing: styles are inline, pictures are data URIs and charts are
inline SVG. Every text given here is data; markup in it is shown, not interpreted.
"""

import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby, pairwise
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from apecache.errors import OptionError
from apecache.report.charts.axes import ticks
from apecache.report.charts.intervals import Intervals, draw_intervals
from apecache.report.charts.parallel import Parallel, draw
from apecache.report.gallery import Gallery
from apecache.storage.replace import replace_bytes

Cell = str | float | int | None
Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Hold a table of results.

    Attributes:
        title: the heading above the table.
        columns: the column headings.
        rows: the cells, each row as long as `columns`. Floats are rounded to `decimals`, integers
            are shown in full and None is shown as an en dash; state the unit (such as %) in the
            heading.
        note: a remark shown below the table, left out when empty.
        decimals: number of digits after the decimal point of every float.

    Raises:
        ValueError: a row's length differs from that of `columns`, or `decimals` is negative.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    decimals: int = 1

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {number} has {len(row)} cells for {len(self.columns)} columns"
                )
        if self.decimals < 0:
            raise ValueError(f"decimals must not be negative, got {self.decimals}")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Hold a named line: points (x, y) in drawing order, of which non-finite ones leave a gap."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Hold curves on common linear axes.

    Attributes:
        title: the heading above the chart.
        x_label: quantity (and unit) along the horizontal axis.
        y_label: quantity (and unit) along the vertical axis.
        curves: the lines, drawn in this order and distinguished by color and dash pattern.
        marker: x at which a vertical dashed line is drawn, None for no line.
        marker_label: what the dashed line stands for; the legend appends its x.
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    marker: float | None = None
    marker_label: str = "marked"


@dataclass(frozen=True, kw_only=True)
class Page:
    """Hold everything that one page shows, in this order.

    Attributes:
        title: the main heading and the document's title.
        subtitle: a line below it, left out when empty.
        commands: command lines that reproduce the result, shown verbatim.
        tables: result tables.
        parallels: settings and scores of a sweep's trials.
        charts: learning curves and the like.
        galleries: retrieval examples.
        notes: closing remarks, one paragraph each.
        intervals: published and measured differences; they stand above the charts.
    """

    title: str
    subtitle: str = ""
    commands: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    parallels: tuple[Parallel, ...] = ()
    charts: tuple[Chart, ...] = ()
    galleries: tuple[Gallery, ...] = ()
    notes: tuple[str, ...] = ()
    intervals: tuple[Intervals, ...] = ()


def render_page(page: Page) -> str:
    """Return the page as an HTML document that encodes to UTF-8 without error."""
    return environment().get_template("page.html").render(page=page)


def write_page(page: Page, path: str | os.PathLike[str]) -> Path:
    """Write the page to `path` and return it as a Path; its folder must exist.

    The file is replaced in one step: readers see the earlier file or the whole new one, and an
    error leaves the earlier file untouched.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        raise OptionError(f"{target} is not a regular file; choose another --out")
    data = render_page(page).encode("utf-8")
    replace_bytes(target, data)
    return target


@cache
def environment() -> Environment:
    """Return the templates, with autoescape; whatever is shown is rendered by them."""
    templates = Environment(
        loader=PackageLoader("apecache.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters.update(
        cell=_cell,
        numeric_columns=_numeric_columns,
        plot=_plot,
        parallel=draw,
        drawn=draw_intervals,
    )
    return templates


# Control characters but tab and line ends, lone surrogates (which UTF-8 cannot encode) and
# non-characters.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def _printable(value: object) -> object:
    # What has `__html__` is the output of a template macro, whose own values have come through here
    # already.
    if isinstance(value, str) and not hasattr(value, "__html__"):
        return _UNPRINTABLE.sub("\ufffd", value)
    return value


def _cell(value: Cell, decimals: int) -> str:
    if value is None:
        return "\u2013"
    if isinstance(value, str | bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if math.isfinite(value) and abs(value) >= 1e15:
        return f"{value:.{decimals}e}"
    # Adding zero turns the -0.0 that rounding may leave into 0.0.
    return f"{round(float(value), decimals) + 0.0:.{decimals}f}"


def _numeric_columns(table: Table) -> tuple[bool, ...]:
    """Tell of each column whether it has numbers, and no texts."""
    are_numeric = []
    for index in range(len(table.columns)):
        cells = [row[index] for row in table.rows if row[index] is not None]
        has_text = any(isinstance(cell, str) for cell in cells)
        are_numeric.append(bool(cells) and not has_text)
    return tuple(are_numeric)


_WIDTH = 480
_HEIGHT = 270
_TOP = 10
_RIGHT = 12
_BOTTOM = 30
_INSET = 10
_DOTS_UP_TO = 40
_LARGEST = 1e300
_SMALLEST = 1e-300


@dataclass(frozen=True, kw_only=True)
class _Scale:
    """Map data (low…high) linearly to SVG user units (start…end)."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> str:
        share = (value - self.low) / (self.high - self.low)
        return f"{self.start + share * (self.end - self.start):.1f}"


@dataclass(frozen=True, kw_only=True)
class _Line:
    """Hold a curve as data of an SVG path and as dots (x, y)."""

    path: str
    dots: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """Hold what the chart template draws: positions in SVG user units, each tick with its label."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    x_ticks: tuple[tuple[str, str], ...]
    y_ticks: tuple[tuple[str, str], ...]
    lines: tuple[_Line, ...]
    marker: str | None
    marker_value: str


def _plot(chart: Chart) -> _Plot:
    marker = chart.marker if chart.marker is not None and _drawable(chart.marker) else None
    xs: list[float] = []
    ys: list[float] = []
    for curve in chart.curves:
        for x, y in curve.points:
            if _drawable(x, y):
                xs.append(x)
                ys.append(y)
    has_points = bool(ys)
    if marker is not None and has_points:
        xs.append(marker)
    x_low, x_high = _extent(xs)
    enclosing_ticks = ticks(x_low, x_high, whole=all(map(_is_whole, xs)))
    x_ticks = [x for x in enclosing_ticks if x_low <= x <= x_high]
    y_low, y_high = _extent(ys)
    y_ticks = ticks(y_low, y_high)
    y_labels = _labels(y_ticks)
    # Sized for the larger type of the narrow layout, about 9 units a character.
    left_edge = 14 + 9 * max(map(len, y_labels))
    right_edge = _WIDTH - _RIGHT
    bottom_edge = _HEIGHT - _BOTTOM
    x_scale = _Scale(low=x_low, high=x_high, start=left_edge + _INSET, end=right_edge - _INSET)
    y_scale = _Scale(low=y_ticks[0], high=y_ticks[-1], start=bottom_edge, end=_TOP)
    # Without points the axes have no meaning: the template says so instead of drawing ticks.
    labeled_x: tuple[tuple[str, str], ...] = ()
    labeled_y: tuple[tuple[str, str], ...] = ()
    if has_points:
        labeled_x = tuple(zip(map(x_scale.at, x_ticks), _labels(x_ticks), strict=True))
        labeled_y = tuple(zip(map(y_scale.at, y_ticks), y_labels, strict=True))
    return _Plot(
        width=_WIDTH,
        height=_HEIGHT,
        left=left_edge,
        right=right_edge,
        top=_TOP,
        bottom=bottom_edge,
        x_ticks=labeled_x,
        y_ticks=labeled_y,
        lines=tuple(_line(curve, x_scale, y_scale) for curve in chart.curves),
        marker=x_scale.at(marker) if has_points and marker is not None else None,
        marker_value="" if marker is None else f"{marker:g}",
    )


def _line(curve: Curve, x_scale: _Scale, y_scale: _Scale) -> _Line:
    """Draw each run of drawable points as a separate line, and as dots if they are few or alone."""
    runs: list[list[tuple[str, str]]] = []
    for drawable, points in groupby(curve.points, lambda point: _drawable(*point)):
        if drawable:
            runs.append([(x_scale.at(x), y_scale.at(y)) for x, y in points])
    are_few = sum(map(len, runs)) <= _DOTS_UP_TO
    lines = []
    dots = []
    for run in runs:
        if len(run) > 1:
            lines.append("M" + " L".join(f"{x} {y}" for x, y in run))
        # A line through one point would not be seen.
        if are_few or len(run) == 1:
            dots += run
    return _Line(path=" ".join(lines), dots=tuple(dots))


def _drawable(*values: float) -> bool:
    # Beyond this the extent of an axis could overflow.
    return all(math.isfinite(value) and abs(value) <= _LARGEST for value in values)


def _is_whole(value: float) -> bool:
    return float(value).is_integer()


def _extent(values: Sequence[float]) -> Point:
    """Return the lowest and highest value, moved apart if they are too close for an axis."""
    low = min(values, default=0.0)
    high = max(values, default=0.0)
    size = max(abs(low), abs(high))
    if high - low > max(_SMALLEST, 1e-6 * size):
        return low, high
    pad = size / 2 if size > _SMALLEST else 1.0
    return low - pad, high + pad


def _labels(values: Iterable[float]) -> list[str]:
    """Format ticks with as many digits as neighbors need to differ.

    Very large and very small ticks are in scientific notation.
    """
    numbers = list(values)
    largest = max(map(abs, numbers))
    step = min((b - a for a, b in pairwise(numbers)), default=1.0)
    # Rounding may leave a step just below 0.1, which would need a second digit.
    power = math.floor(math.log10(step) + 1e-6)
    if largest == 0 or 1e-3 <= largest < 1e6:
        return [f"{number:,.{max(0, -power)}f}" for number in numbers]
    digits = max(0, math.floor(math.log10(largest) + 1e-6) - power)
    return ["0" if number == 0 else f"{number:.{digits}e}" for number in numbers]
