"""Draw parallel coordinates as inline SVG: axes for settings and score, a line for each trial."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from apecache.report.charts.axes import log_ticks, ticks
from apecache.sweeps.space import Dimension

SPACING = 132
TOP = 34
HEIGHT = 230
UNSET = 26
LABEL = 14
"""Characters of a label at most; the list below the drawing has the whole name."""
SHADES = 5
Value = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Hold one setting's values of all trials, or the scores."""

    name: str
    kind: str
    """`log`, `linear`, or `choice`."""
    values: tuple[Value, ...]
    """Of each trial in turn; None where the setting does not apply."""
    options: tuple[Value, ...] = ()
    """Of a `choice`, drawn from below upwards."""

    @cached_property
    def extent(self) -> tuple[float, float]:
        """Return the lowest and the highest value of the axis, which differ."""
        finite = [float(v) for v in self.values if isinstance(v, int | float) and math.isfinite(v)]
        low = min(finite, default=0.0)
        high = max(finite, default=1.0)
        if high > low:
            return low, high
        # One value alone stands in the middle.
        return low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2

    def place(self, value: Value) -> float | None:
        """Return the position of a value, from 0 at the lower end to 1 at the upper.

        None: there is nothing to place.
        """
        if value is None:
            return None
        if self.kind == "choice":
            if value not in self.options:
                return None
            return (self.options.index(value) + 0.5) / len(self.options)
        number = float(value)
        low, high = self.extent
        if not math.isfinite(number):
            return None
        # Without a positive lower end there is no logarithm, and the axis is linear.
        if self.kind == "log" and low > 0:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    def labels(self) -> list[tuple[float, str]]:
        """Return (position, words) of the axis's marks."""
        marks: list[tuple[float, str]] = []
        if self.kind == "choice":
            for number, option in enumerate(self.options):
                position = (number + 0.5) / len(self.options)
                marks.append((position, shortened(worded(option))))
            return marks
        low, high = self.extent
        if self.kind == "log" and low > 0:
            values = log_ticks(low, high)
        else:
            are_integers = all(isinstance(v, int) for v in self.values if v is not None)
            values = ticks(low, high, are_integers)
        for value in values:
            value_position = self.place(value)
            # Linear ticks enclose the values; the axis ends with them.
            if low <= value <= high and value_position is not None:
                marks.append((value_position, f"{value:.4g}"))
        return marks


def worded(value: object) -> str:
    """Return a value as people read it."""
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
    return str(value)


def shortened(text: str) -> str:
    """Return a text of at most `LABEL` characters, with … for what is cut off."""
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """Hold the axes and trials of one drawing.

    Better trials are drawn later and stronger, the best one in a different color.
    """

    title: str
    note: str
    axes: tuple[Axis, ...]
    """Of the settings and of the score; each has a value for each trial."""
    scores: tuple[float, ...]
    """Of each trial, larger is better."""


@dataclass(frozen=True, kw_only=True)
class DrawnAxis:
    """Hold an axis in SVG user units."""

    number: int
    name: str
    x: float
    marks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class DrawnLine:
    """Hold the line of a trial."""

    path: str
    """Data of an SVG path."""
    shade: str
    """A class of the style sheet."""


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """Hold what the template draws, in SVG user units."""

    width: int
    height: int
    top: int
    bottom: int
    axes: tuple[DrawnAxis, ...]
    lines: tuple[DrawnLine, ...]


def draw(parallel: Parallel) -> Drawn:
    """Place the axes side by side and a line through them for each trial."""
    bottom = TOP + HEIGHT
    xs = []
    axes = []
    for index, axis in enumerate(parallel.axes):
        x = SPACING * (index + 0.5)
        xs.append(x)
        axes.append(_axis(index, axis=axis, x=x, bottom=bottom))
    # Of equal scores the earlier trial is drawn later, so that it is the best one.
    order = sorted(range(len(parallel.scores)), key=lambda i: (parallel.scores[i], -i))
    lines = []
    for trial, shade in zip(order, _shades(len(order)), strict=True):
        path = _path(parallel.axes, xs=xs, trial=trial, bottom=bottom)
        lines.append(DrawnLine(path=path, shade=shade))
    return Drawn(
        width=SPACING * len(axes),
        height=bottom + UNSET + 16,
        top=TOP,
        bottom=bottom,
        axes=tuple(axes),
        lines=tuple(lines),
    )


def _shades(count: int) -> list[str]:
    """Return the style classes of `count` trials, the worst first."""
    shades = [f"shade-{rank * SHADES // count}" for rank in range(count)]
    return [*shades[:-1], "best"] if shades else []


def _axis(index: int, axis: Axis, x: float, bottom: int) -> DrawnAxis:
    marks = [(_y(position, bottom), words) for position, words in axis.labels()]
    if any(axis.place(value) is None for value in axis.values):
        marks.append((_y(None, bottom), "not set"))
    return DrawnAxis(number=index + 1, name=axis.name, x=x, marks=tuple(marks))


def _path(axes: Sequence[Axis], xs: Sequence[float], trial: int, bottom: int) -> str:
    points = []
    for axis, x in zip(axes, xs, strict=True):
        y = _y(axis.place(axis.values[trial]), bottom)
        points.append(f"{x:.1f} {y:.1f}")
    return "M" + " L".join(points)


def _y(position: float | None, bottom: int) -> float:
    # Values that are not set lie below the axis.
    return float(bottom + UNSET) if position is None else bottom - position * HEIGHT


def axis_of(name: str, dimension: Dimension | None, values: Sequence[Value]) -> Axis:
    """Make the axis of one setting as the sweep chose it: `log`, `choice`, else linear.

    Args:
        dimension: None for a linear axis.
        values: of each trial in turn.
    """
    if dimension is not None and dimension.choice is not None:
        # As words: equal values such as 1 and True stay two options.
        return Axis(
            name=name,
            kind="choice",
            values=tuple(None if value is None else worded(value) for value in values),
            options=tuple(worded(option) for option in dimension.choice),
        )
    is_log = dimension is not None and dimension.log is not None
    return Axis(name=name, kind="log" if is_log else "linear", values=tuple(values))
