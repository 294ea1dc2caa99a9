"""Heat maps as an SVG file of its own: no script, nothing loaded, every value written in its
cell."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from apecache.evaluate.scout import ScoutReport

CELL = (72, 30)
LINE = 22
LETTER = 6.6
LIGHT = (239, 244, 251)
DARK = (23, 64, 122)


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """`values` [rows][columns]; the lightest cell is the smallest value, the darkest the largest.
    `digits` after the point."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    digits: int = 1


def scout_maps(report: ScoutReport) -> list[HeatMap]:
    """One map for each measure: image cuts down, text cuts across, each encoder's from its first
    layer to its last."""
    found = {(row.image, row.text): row.likeness for row in report.rows}
    images, texts = (sorted({pair[side] for pair in found}, key=_by_layer) for side in (0, 1))
    return [
        HeatMap(
            title=title,
            rows=images,
            columns=texts,
            values=[[getattr(found[i, t], name) for t in texts] for i in images],
            digits=digits,
        )
        for title, name, digits in (
            (
                f"R@1 of a ridge regression, mean of both ways, % (chance {report.chance:.1f})",
                "recall_at_1",
                1,
            ),
            ("Linear CKA", "cka", 3),
            ("Mutual nearest neighbours, k = 10", "mutual_knn", 3),
        )
    ]


def _by_layer(name: str) -> tuple[str | int, ...]:
    """Numbers in names by their size: layer 2 stands before layer 10."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name))


def render_heat_maps(maps: Sequence[HeatMap]) -> str:
    """One below the other."""
    parts = []
    top = 0.0
    width = 0.0
    for each in maps:
        drawn, right, bottom = _draw(each, top)
        parts += drawn
        top = bottom + LINE
        width = max(width, right)
    size = f'width="{width:.0f}" height="{top:.0f}" viewBox="0 0 {width:.0f} {top:.0f}"'
    style = 'font-family="sans-serif" font-size="12"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join(
        [f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', ground, *parts, "</svg>", ""]
    )


def _draw(each: HeatMap, top: float) -> tuple[list[str], float, float]:
    """Elements, and the right and lower end."""
    left = 16 + LETTER * max(map(len, each.rows), default=0)
    head = top + 2 * LINE + LETTER * 0.7 * max(map(len, each.columns), default=0)
    parts = [_text(each.title, x=8, y=top + LINE, more='font-weight="bold"')]
    for j, column in enumerate(each.columns):
        x = left + (j + 0.5) * CELL[0]
        y = head - 6
        parts.append(_text(column, x=x, y=y, more=f'transform="rotate(-35 {x:.1f} {y:.1f})"'))
    lowest, highest = (
        end((v for row in each.values for v in row), default=0.0) for end in (min, max)
    )
    for i, (row, values) in enumerate(zip(each.rows, each.values, strict=True)):
        y = head + i * CELL[1]
        parts.append(_text(row, x=left - 6, y=y + 20, more='text-anchor="end"'))
        for j, value in enumerate(values):
            share = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
            parts += _cell(left + j * CELL[0], y=y, words=f"{value:.{each.digits}f}", share=share)
    longest = max((j * CELL[0] + LETTER * len(c) for j, c in enumerate(each.columns)), default=0.0)
    right = (
        left + max(len(each.columns) * CELL[0], longest + CELL[0], LETTER * len(each.title)) + 16
    )
    return parts, right, head + len(each.rows) * CELL[1]


def _cell(x: float, y: float, words: str, share: float) -> list[str]:
    colour = "#" + "".join(
        f"{round(a + share * (b - a)):02x}" for a, b in zip(LIGHT, DARK, strict=True)
    )
    place = f'x="{x:.1f}" y="{y:.1f}" width="{CELL[0]}" height="{CELL[1]}"'
    ink = "white" if share > 0.5 else "black"
    middle = _text(words, x=x + CELL[0] / 2, y=y + 20, more=f'text-anchor="middle" fill="{ink}"')
    return [f'<rect {place} fill="{colour}" stroke="white"/>', middle]


def _text(words: str, x: float, y: float, more: str) -> str:
    shown = escape("".join(c if c.isprintable() else "\ufffd" for c in words))
    return f'<text x="{x:.1f}" y="{y:.1f}" {more}>{shown}</text>'
