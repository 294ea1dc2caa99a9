"""Pages have the figures of the results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.quality.heads import COMBINATION
from benchmarks.quality.summary import table_lines

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "results" / "quality.md"
README = ROOT / "README.md"
HEADS = ROOT / "benchmarks" / "results" / "quality-heads.json"


def test_the_page_has_the_table_of_the_results() -> None:
    assert "\n".join(table_lines()) in PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [README, PAGE], ids=["README", "quality"])
def test_tables_of_heads_have_the_figures_of_the_results(page: Path) -> None:
    shown = rows_of_heads(page)
    measured = {row["recipe"]: row for row in json.loads(HEADS.read_text(encoding="utf-8"))["rows"]}
    if page == PAGE:
        assert shown.keys() == measured.keys()
    assert len(shown) > 3
    for recipe, cells in shown.items():
        row = measured[recipe]
        figures = [row["i2t R@1"], row["t2i R@1"], row["parameters"] / 1e6]
        for cell, figure in zip(cells, figures, strict=True):
            assert abs(cell - figure) <= 0.0501, f"{recipe}: {cell} is shown, {figure} is measured"


def rows_of_heads(page: Path) -> dict[str, list[float]]:
    """R@1 of both directions and millions of parameters, by recipe."""
    text = page.read_text(encoding="utf-8")
    begin = re.search(
        r"^\| (heads|recipe) \| image to text \|.*\n\|[-|]+\n", text, flags=re.MULTILINE
    )
    assert begin is not None
    found = {}
    for line in text[begin.end() :].splitlines():
        if not line.startswith("|"):
            break
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        recipes = re.findall(r"`([\w-]+)`", name)
        recipe = " + ".join(COMBINATION) if len(recipes) > 1 else recipes[0]
        found[recipe] = [float(cell.removesuffix(" M")) for cell in cells[:3]]
    return found
