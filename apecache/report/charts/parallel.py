"""Parallel coordinates: an axis for each setting and one for the score, a line for each trial.
Inline SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from apecache.report.charts.axes import log_ticks, ticks
from apecache.sweeps.space import Dimension

SPACING = 132
TOP = 34
HEIGHT = 230
UNSET = 26
LABEL = 14
"""Characters of a label at most; the whole name stands in the list below the drawing."""
SHADES = 5
Value = str | int | float | bool | None


@dataclass(frozen=True, kw_only=True)
class Axis:
    """`kind`: `log`, `linear`, or `choice` of `options`, which are drawn from below upwards.
    `values`: of each trial in turn; None where the setting does not apply."""

    name: str
    kind: str
    values: tuple[Value, ...]
    options: tuple[Value, ...] = ()

    @cached_property
    def extent(self) -> tuple[float, float]:
        numbers = [float(v) for v in self.values if isinstance(v, int | float) and math.isfinite(v)]
        low = min(numbers, default=0.0)
        high = max(numbers, default=1.0)
        return (
            (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)
        )

    def place(self, value: Value) -> float | None:
        """0 at the lower end to 1 at the upper; None where there is nothing to place."""
        if value is None:
            return None
        if self.kind == "choice":
            return (
                (self.options.index(value) + 0.5) / len(self.options)
                if value in self.options
                else None
            )
        number = float(value)
        (low, high) = self.extent
        if not math.isfinite(number):
            return None
        if self.kind == "log" and low > 0:
            return math.log(number / low) / math.log(high / low)
        return (number - low) / (high - low)

    def labels(self) -> list[tuple[float, str]]:
        """(place, words) of its marks."""
        if self.kind == "choice":
            return [
                ((i + 0.5) / len(self.options), shortened(worded(o)))
                for i, o in enumerate(self.options)
            ]
        low, high = self.extent
        whole = all(isinstance(value, int) for value in self.values if value is not None)
        if self.kind == "log" and low > 0:
            marks = list(log_ticks(low, high))
        else:
            marks = [mark for mark in ticks(low, high, whole) if low <= mark <= high]
        return [(place, f"{mark:.4g}") for mark in marks if (place := self.place(mark)) is not None]


def worded(value: Any) -> str:
    """A value as people read it."""
    match value:
        case None:
            return "not set"
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:.4g}"
    return str(value)


def shortened(text: str) -> str:
    return text if len(text) <= LABEL else text[: LABEL - 1] + "…"


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """`scores`: of each trial, larger is better; `axes`: of the settings and of the score, as long
    as `scores`. Better trials are drawn later and stronger, the best one in a colour of its own."""

    title: str
    note: str
    axes: tuple[Axis, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnAxis:
    number: int
    name: str
    x: float
    marks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class DrawnLine:
    path: str
    shade: str


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the template needs, in SVG user units."""

    width: int
    height: int
    top: int
    bottom: int
    axes: tuple[DrawnAxis, ...]
    lines: tuple[DrawnLine, ...]


def draw(parallel: Parallel) -> Drawn:
    bottom = TOP + HEIGHT
    xs = [SPACING * (i + 0.5) for i in range(len(parallel.axes))]
    axes = tuple(
        _axis(i, axis=axis, x=x, bottom=bottom)
        for i, (axis, x) in enumerate(zip(parallel.axes, xs, strict=True))
    )
    order = sorted(range(len(parallel.scores)), key=lambda i: (parallel.scores[i], -i))
    shades = _shades(len(order))
    lines = tuple(
        DrawnLine(path=_path(parallel.axes, xs=xs, trial=i, bottom=bottom), shade=shades[rank])
        for rank, i in enumerate(order)
    )
    return Drawn(
        width=SPACING * len(axes),
        height=bottom + UNSET + 16,
        top=TOP,
        bottom=bottom,
        axes=axes,
        lines=lines,
    )


def _shades(count: int) -> list[str]:
    """Worst first; the last one is the best."""
    found = [f"shade-{min(SHADES - 1, rank * SHADES // max(1, count))}" for rank in range(count)]
    return [*found[:-1], "best"] if found else []


def _axis(index: int, axis: Axis, x: float, bottom: int) -> DrawnAxis:
    marks = [(_y(place, bottom), words) for place, words in axis.labels()]
    if any(axis.place(value) is None for value in axis.values):
        marks.append((_y(None, bottom), "not set"))
    return DrawnAxis(number=index + 1, name=axis.name, x=x, marks=tuple(marks))


def _path(axes: Sequence[Axis], xs: Sequence[float], trial: int, bottom: int) -> str:
    points = [
        (x, _y(axis.place(axis.values[trial]), bottom)) for axis, x in zip(axes, xs, strict=True)
    ]
    return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _y(place: float | None, bottom: int) -> float:
    return float(bottom + UNSET) if place is None else bottom - place * HEIGHT


def axis_of(name: str, dimension: Dimension | None, values: Sequence[Value]) -> Axis:
    """The axis of one setting by how the sweep chose it: `log`, `choice`, else linear; None is
    linear."""
    if dimension is not None and dimension.choice is not None:
        options = tuple(worded(option) for option in dimension.choice)
        return Axis(
            name=name,
            kind="choice",
            values=tuple(None if v is None else worded(v) for v in values),
            options=options,
        )
    return Axis(
        name=name,
        kind="log" if dimension is not None and dimension.log is not None else "linear",
        values=tuple(values),
    )
