"""The committed table of the laws."""

from benchmarks.laws.render import NO_CHANCE, RESULTS, TABLE, kept, render


def test_the_committed_table_is_made_of_the_committed_results() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(kept(RESULTS)), (
        "run: python -m benchmarks.laws.render"
    )


def test_chance_stands_below_the_arms_where_it_was_recorded() -> None:
    (result, *_) = kept(RESULTS)
    for arm in result["law"]["arms"]:
        arm.pop("chance", None)
    assert NO_CHANCE in render([result])
    for arm in result["law"]["arms"]:
        arm["chance"] = {"tr": 0.53, "ir": 0.54, "recall": 0.535, "r1": 0.1}
    rendered = render([result])
    assert NO_CHANCE not in rendered
    (row,) = [line for line in rendered.splitlines() if line.startswith("| chance |")]
    (header,) = [line for line in rendered.splitlines() if line.startswith("| arm |")]
    assert row.count("|") == header.count("|")
    assert "0.53" in row
