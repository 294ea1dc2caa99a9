"""Draw heat maps as an SVG file: no script, nothing loaded, every value written in its cell."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from apecache.evaluate.scout import ScoutReport
from apecache.metrics.geometry import KNN_NEIGHBORS

CELL = (72, 30)
"""Width and height."""
LINE = 22
LETTER = 6.6
"""Mean width of a letter at font size 12: an SVG file cannot measure text."""
LIGHT = (239, 244, 251)
DARK = (23, 64, 122)
"""Colors of the smallest and the largest value."""


@dataclass(frozen=True, kw_only=True)
class HeatMap:
    """Hold a table of numbers; the lightest cell is the smallest value, the darkest the largest."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[Sequence[float]]
    """[rows][columns]."""
    digits: int = 1
    """After the decimal point."""


def scout_maps(report: ScoutReport) -> list[HeatMap]:
    """Make one map for each measure.

    Rows are the image cuts, columns the text cuts, from each encoder's first layer to its last.
    """
    likeness = {(row.image, row.text): row.likeness for row in report.rows}
    images = sorted({image for image, _ in likeness}, key=_by_layer)
    texts = sorted({text for _, text in likeness}, key=_by_layer)
    recall_title = f"R@1 of a ridge regression, mean of both ways, % (chance {report.chance:.1f})"
    measures = (
        (recall_title, "recall_at_1", 1),
        ("Linear CKA", "cka", 3),
        (f"Mutual nearest neighbors, k = {KNN_NEIGHBORS}", "mutual_knn", 3),
    )
    maps = []
    for title, field, digits in measures:
        values = []
        for image in images:
            values.append([getattr(likeness[image, text], field) for text in texts])
        heat_map = HeatMap(title=title, rows=images, columns=texts, values=values, digits=digits)
        maps.append(heat_map)
    return maps


def _by_layer(name: str) -> tuple[str | int, ...]:
    """Return a key that sorts numbers in names by their size: layer 2 before layer 10."""
    # Texts and numbers alternate, so that no text is ever compared with a number.
    pieces = re.split(r"(\d+)", name)
    return tuple(int(piece) if piece.isdecimal() else piece for piece in pieces)


def render_heat_maps(maps: Sequence[HeatMap]) -> str:
    """Return an SVG file with the maps one below the other."""
    elements = []
    top = 0.0
    width = 0.0
    for heat_map in maps:
        map_elements, right, bottom = _draw(heat_map, top)
        elements += map_elements
        top = bottom + LINE
        width = max(width, right)
    size = f'width="{width:.0f}" height="{top:.0f}" viewBox="0 0 {width:.0f} {top:.0f}"'
    style = 'font-family="sans-serif" font-size="12"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
    return "\n".join([opening, ground, *elements, "</svg>", ""])


def _draw(heat_map: HeatMap, top: float) -> tuple[list[str], float, float]:
    """Return the elements of a map that begins at y = `top`, and its right and lower end."""
    cell_width, cell_height = CELL
    columns = heat_map.columns
    x_cells = 16 + LETTER * max(map(len, heat_map.rows), default=0)
    # Column names are turned by 35 degrees: their height is below 0.7 of their length.
    head = top + 2 * LINE + LETTER * 0.7 * max(map(len, columns), default=0)
    elements = [_text(heat_map.title, x=8, y=top + LINE, attributes='font-weight="bold"')]
    longest = 0.0
    for j, column in enumerate(columns):
        # A long name of one of the last columns reaches beyond the cells.
        longest = max(longest, j * cell_width + LETTER * len(column))
        x = x_cells + (j + 0.5) * cell_width
        y = head - 6
        turned = f'transform="rotate(-35 {x:.1f} {y:.1f})"'
        elements.append(_text(column, x=x, y=y, attributes=turned))
    all_values = [value for row_values in heat_map.values for value in row_values]
    lowest = min(all_values, default=0.0)
    highest = max(all_values, default=0.0)
    for i, (row, row_values) in enumerate(zip(heat_map.rows, heat_map.values, strict=True)):
        y = head + i * cell_height
        elements.append(_text(row, x=x_cells - 6, y=y + 20, attributes='text-anchor="end"'))
        for j, value in enumerate(row_values):
            share = (value - lowest) / (highest - lowest) if highest > lowest else 0.0
            words = f"{value:.{heat_map.digits}f}"
            elements += _cell(x_cells + j * cell_width, y=y, words=words, share=share)
    cells_width = len(columns) * cell_width
    title_width = LETTER * len(heat_map.title)
    right = x_cells + max(cells_width, longest + cell_width, title_width) + 16
    return elements, right, head + len(heat_map.rows) * cell_height


def _cell(x: float, y: float, words: str, share: float) -> list[str]:
    color = "#"
    for light, dark in zip(LIGHT, DARK, strict=True):
        channel = round(light + share * (dark - light))
        color += f"{channel:02x}"
    bounds = f'x="{x:.1f}" y="{y:.1f}" width="{CELL[0]}" height="{CELL[1]}"'
    ink = "white" if share > 0.5 else "black"
    centered = f'text-anchor="middle" fill="{ink}"'
    value = _text(words, x=x + CELL[0] / 2, y=y + 20, attributes=centered)
    return [f'<rect {bounds} fill="{color}" stroke="white"/>', value]


def _text(words: str, x: float, y: float, attributes: str) -> str:
    # XML forbids most control characters, even escaped ones.
    printable = "".join(letter if letter.isprintable() else "\ufffd" for letter in words)
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(printable)}</text>'
