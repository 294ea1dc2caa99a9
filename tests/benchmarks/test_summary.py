"""The page of quality has the table that the results make."""

from pathlib import Path

from benchmarks.quality.summary import table_lines

PAGE = Path(__file__).parents[2] / "docs" / "results" / "quality.md"


def test_the_page_has_the_table_of_the_results() -> None:
    assert "\n".join(table_lines()) in PAGE.read_text(encoding="utf-8")
