"""The committed table of the laws."""

from benchmarks.laws.render import RESULTS, TABLE, kept, render


def test_the_committed_table_is_made_of_the_committed_results() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(kept(RESULTS)), (
        "run: python -m benchmarks.laws.render"
    )
