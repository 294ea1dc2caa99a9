"""The time of a search is divided before the sweep begins."""

import pytest

from apecache.auto.search_plan import (
    CLOSED_FORMS,
    FIT_COST,
    N_REFITS,
    TRIAL_COST,
    plan_seeds,
    plan_trials,
    search_space,
)
from apecache.recipes.recipe import load_recipe, zoo_names


def test_the_closed_forms_are_those_of_the_zoo_with_one_weighting_of_cca() -> None:
    """`csa` and `weighted-cca` differ in their weights alone; asif's heads hold all pairs."""
    maps = {
        name for name in zoo_names() if load_recipe(name).init in ("cca", "ridge", "procrustes")
    }
    assert set(CLOSED_FORMS) == maps - {"csa"}


def test_seeds_follow_the_budget() -> None:
    assert plan_seeds(left_seconds=700, fit_seconds=40) == 3
    assert plan_seeds(left_seconds=100, fit_seconds=40) == 2


@pytest.mark.parametrize("left_seconds", [800.0, 2000.0])
def test_trials_leave_time_for_the_fits_after_them(left_seconds: float) -> None:
    n_trials = plan_trials(left_seconds, fit_seconds=20, n_seeds=3)
    after_seconds = (3 * FIT_COST + N_REFITS) * 20
    trial_seconds = TRIAL_COST * 20
    assert n_trials > 4
    assert n_trials * trial_seconds + after_seconds <= left_seconds
    assert (n_trials + 1) * trial_seconds + after_seconds > left_seconds


def test_a_search_without_time_tries_four() -> None:
    assert plan_trials(left_seconds=0, fit_seconds=20, n_seeds=2) == 4


def test_a_family_is_tried_as_it_is_before_any_draw() -> None:
    space = search_space()
    assert space.draw(0, 0) == {"recipe": "gated"}
    assert space.settings(space.draw(0, 0)) == ()
    assert len(space.draw(0, 1)) > 1
    space.draw(0, 0)["recipe"] = "changed"
    assert space.draw(0, 0) == {"recipe": "gated"}
