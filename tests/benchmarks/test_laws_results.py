"""The committed table of the laws."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from benchmarks.laws.rejudge import NOT_RECORDED, rejudged
from benchmarks.laws.render import (
    NO_CHANCE,
    RESULTS,
    TABLE,
    kept,
    page_laws,
    render,
    take,
    with_earlier,
)
from benchmarks.laws.results import FOLDER


def test_the_committed_table_is_made_of_the_committed_results() -> None:
    assert TABLE.read_text(encoding="utf-8") == render(kept(RESULTS)), (
        "run: python -m benchmarks.laws.render"
    )


def test_chance_stands_below_the_arms_where_it_was_recorded() -> None:
    (result, *_) = kept(RESULTS)
    # Earlier runs have arms of their own.
    result.pop("earlier", None)
    result.pop("former", None)
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


def committed() -> dict[str, Any]:
    """A result of one run at size small, of which three comparisons were measured."""
    value = deepcopy(next(one for one in kept(RESULTS) if one["law"]["id"] == "L2"))
    value.pop("earlier", None)
    law = value["law"]
    law["compared"] = law["compared"][:4]
    for index, compared in enumerate(law["compared"]):
        judged(compared, None if index == 3 else 1.5)
    law["setting"]["size"]["name"] = "small"
    law["cpu_hours"] = 0.0
    value["former"] = [
        {"name": one["name"], "metric": one["metric"], "verdict": "broken"}
        for one in law["compared"][:2]
    ]
    return value


def judged(compared: dict[str, Any], difference: float | None) -> None:
    verdict = "not decided" if difference is None else "not testable"
    compared["judgement"] |= {"difference": difference, "verdict": verdict, "why": "as given"}


def run_again(index: int) -> dict[str, Any]:
    """The same with all data, one comparison of it measured and held."""
    value = committed()
    del value["former"]
    law = value["law"]
    law["setting"]["size"]["name"] = "all-data"
    law |= {"cpu_hours": 0.25, "made_flops": 1e12, "left_flops": 4e12}
    for place, compared in enumerate(law["compared"]):
        judged(compared, 7.25 if place == index else None)
    law["compared"][index]["judgement"]["verdict"] = "held"
    return value


def test_a_run_of_some_comparisons_leaves_the_others_as_they_were_measured() -> None:
    merged = with_earlier(run_again(1), committed())
    (earlier,) = merged["earlier"]
    names = [one["name"] for one in committed()["law"]["compared"]]
    assert [one["name"] for one in earlier["law"]["compared"]] == [names[0], names[2]]
    rendered = render([merged])
    # Held, broken, open, not testable: each comparison counts once.
    title = "| L2 | What to unlock, for zero-shot classification |"
    assert f"{title} held as far as decided (1 of 4) | 1, 0, 1, 2 |" in rendered
    assert rendered.count("## L2. ") == 1
    assert rendered.index("name small") < rendered.index("name all-data")
    _, _, former = rendered.partition("## Former and present verdicts")
    assert f"| L2 | {names[1]} | tr | broken | held |" in former
    small, large = page_laws(merged)
    assert "size small" in small.title
    assert [one.name for one in large.compared] == [names[1], names[3]]


def test_a_run_of_all_that_was_measured_replaces_it() -> None:
    once = with_earlier(run_again(1), committed())
    twice = with_earlier(run_again(1), once)
    assert twice == once
    value = run_again(0)
    for compared in value["law"]["compared"]:
        judged(compared, 7.25)
    assert "earlier" not in with_earlier(value, once)


def test_what_runs_took_and_what_the_rest_would_take_is_printed() -> None:
    rendered = render([with_earlier(run_again(1), committed())])
    assert "CPU hours on one thread: 0.25 of the ten" in rendered
    (row,) = [line for line in rendered.splitlines() if line.startswith("| L2 | size all-data")]
    assert row.endswith("| 1, 0, 0, 0 | 0.25 | 1.0 |")
    assert "CPU hours on one thread" not in render([committed()])


def test_results_of_a_work_folder_are_taken_beside_those_that_are_committed(
    tmp_path: Path,
) -> None:
    results = tmp_path / "committed"
    results.mkdir()
    (results / "L2.json").write_text(json.dumps(committed()), encoding="utf-8")
    (tmp_path / FOLDER).mkdir()
    law = run_again(1)["law"]
    (tmp_path / FOLDER / "L2.json").write_text(json.dumps(law), encoding="utf-8")
    (path,) = take(tmp_path, results)
    taken = json.loads(path.read_text(encoding="utf-8"))
    compared = [{"heads_alone": None, **one} for one in law["compared"]]
    assert taken["law"]["compared"] == compared
    assert taken["law"]["cpu_hours"] == 0.25
    assert taken["former"] == committed()["former"]
    assert len(taken["earlier"]) == 1


def test_only_runs_without_losses_are_judged_again_from_their_figures() -> None:
    merged = with_earlier(run_again(1), committed())
    for compared in merged["earlier"][0]["law"]["compared"]:
        compared["judgement"]["why"] = "stale"
    again = rejudged(merged)
    assert again["law"] == merged["law"]
    (earlier,) = again["earlier"]
    for compared in earlier["law"]["compared"]:
        assert NOT_RECORDED in compared["judgement"]["why"]
    assert rejudged(committed())["law"]["compared"][0]["judgement"]["verdict"] == "not testable"


def test_norms_of_runs_without_losses_are_not_testable() -> None:
    value = deepcopy(next(one for one in kept(RESULTS) if one["law"]["id"] == "L8"))
    for compared in value["law"]["compared"]:
        compared["judgement"] |= {"verdict": "held", "why": ""}
    for compared in rejudged(value)["law"]["compared"]:
        assert compared["judgement"]["verdict"] == "not testable"
        assert compared["judgement"]["why"] == NOT_RECORDED


def test_what_is_asked_since_is_asked_of_runs_with_losses_too() -> None:
    """Accuracies that heads alone were not measured on, and a small arm that trains more."""
    accuracy = {"name": "l > i", "metric": "top1"}
    value = run_again(0)
    value["law"]["compared"][0] |= accuracy
    (first, *others) = rejudged(value)["law"]["compared"]
    assert first["judgement"]["verdict"] == "not testable"
    assert first["judgement"]["why"] == "what heads alone reach was not measured (top1)"
    assert [one["judgement"] for one in others] == [
        one["judgement"] for one in value["law"]["compared"][1:]
    ]
    value["law"]["compared"][0] |= {"heads_alone": 12.5}
    assert rejudged(value)["law"]["compared"] == value["law"]["compared"]


def test_a_small_arm_that_trains_more_than_the_other_is_judged_again() -> None:
    value = deepcopy(next(one for one in kept(RESULTS) if one["law"]["id"] == "L6"))
    for verdict, lit in (("not testable", 4e6), ("held", 22e6)):
        again = deepcopy(value)
        for arm in again["law"]["arms"]:
            arm["costs"]["trained"] = lit if arm["name"].startswith("lit") else 5.6e6
        for compared in again["law"]["compared"]:
            compared["judgement"] |= {"verdict": "held", "why": ""}
        *of_lit, noise = rejudged(again)["law"]["compared"]
        assert {one["judgement"]["verdict"] for one in of_lit} == {verdict}
        assert noise["judgement"]["verdict"] == "held"
