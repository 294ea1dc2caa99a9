"""Laws as files: what is written in them, and what is refused."""

import re

import pytest

from apecache.errors import OptionError, RecipeError
from apecache.recipes.recipe import load_recipe
from benchmarks.laws.law import Law, law_ids, load_law, parse_law

PLAIN = """
id = "L0"
title = "t"
source = "s"
claim = "c"
metric = "tr"
smallest = 1.0
[arms.a]
recipe = "ape"
published = { tr = 7.0 }
[arms.b]
recipe = "cca"
published = { tr = 5.0 }
[arms.c]
recipe = "ridge"
[[comparisons]]
order = ["a", "b", "c"]
"""


def test_the_laws_are_twelve_in_their_order() -> None:
    assert law_ids() == [f"L{number}" for number in range(1, 13)]


@pytest.mark.parametrize("name", law_ids())
def test_every_law_names_recipes_that_there_are_and_says_where_its_figures_stand(name: str) -> None:
    law = load_law(name)
    assert law.id == name
    for arm in law.arms.values():
        settings = [re.sub("(IMAGE|TEXT)_HALF", "6", setting) for setting in arm.settings]
        recipe = load_recipe(arm.recipe, settings)
        # Whether an arm has learnt is seen from the loss of a guess, ln(candidates).
        assert recipe.loss.kind == "infonce"
    for claim in law.claims():
        assert claim.published is None or claim.place, claim.name
        if claim.published is None:
            assert law.figure.startswith("none") or law.missing, claim.name
        elif not claim.equal:
            assert claim.published > 0, f"{claim.name}: the published figures have another order"
        elif claim.equal:
            assert abs(claim.published) < claim.smallest, (
                f"{claim.name}: the published figures differ"
            )


@pytest.mark.parametrize(
    ("law", "comparison", "figures"),
    [
        ("L1", "i > g", (75.4, 68.6)),
        ("L1", "b > a", (24.3, 0.8)),
        ("L2", "l > i", (15.0, 12.2)),
        ("L3", "Vff-Tuu > Vuf-Tfu", (39.4, 21.5)),
        ("L3", "dino-Vuf-Tuu = dino-Vff-Tuu", (37.2, 37.3)),
        ("L4", "cls-alone > cls-frozen", (37.5, 19.4)),
        ("L9", "lwa > clip", (62.49, 57.15)),
        ("L12", "lit costs less than clip", (109.28, 195.13)),
    ],
)
def test_published_figures_are_those_of_the_papers(
    law: str,
    comparison: str,
    figures: tuple[float, ...],
) -> None:
    (claim,) = [
        one for one in load_law(law).claims() if one.name == comparison and one.figures == figures
    ]
    assert claim.published is not None


def test_an_order_compares_each_arm_with_the_next() -> None:
    claims = parse_law(PLAIN, "x").claims()
    assert [claim.name for claim in claims] == ["a > b", "b > c"]
    assert [claim.published for claim in claims] == [2.0, None]


def test_ape_is_said_to_be_smaller_than_lit_in_each_comparison_with_it() -> None:
    for claim in load_law("L6").claims():
        named = {arm for arm in claim.weights if arm.startswith("ape")}
        assert set(claim.smaller) == named, claim.name


def test_a_difference_of_differences_and_a_bound() -> None:
    more = '[arms.d]\nrecipe = "gated"\n[[comparisons]]\norder = ["a", "b"]\nover = ["c", "d"]\n'
    first, second = parse_law(
        PLAIN.replace('["a", "b", "c"]', '["a"]\nabove = 2.0') + more,
        "x",
    ).claims()
    assert (first.name, first.published, first.difference([9.0])) == ("a > 2", 5.0, 7.0)
    assert second.name == "(a - b) > (c - d)"
    assert second.difference([10.0, 4.0, 3.0, 1.0]) == 4.0


def test_a_cost_is_compared_by_what_is_saved() -> None:
    (claim, *_) = parse_law(
        PLAIN.replace('"tr"', '"trained"').replace("tr =", "trained ="),
        "x",
    ).claims()
    assert claim.saves
    assert claim.difference([25.0, 100.0]) == 75.0


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        ('order = ["a", "b", "c"]', 'order = ["a", "b", "z"]', "names 'z'"),
        ('order = ["a", "b", "c"]', 'order = ["a", "b"]', "no comparison names the arms c"),
        ('order = ["a", "b", "c"]', 'order = ["a", "b", "c"]\nequal = true', "an order of two"),
        (
            'order = ["a", "b", "c"]',
            'order = ["a", "b", "c"]\npublished = [1.0]',
            "one figure for each arm",
        ),
        ('order = ["a", "b", "c"]', 'order = ["a"]', "compared with `above`"),
        (
            'order = ["a", "b", "c"]',
            'order = ["a", "b", "c"]\nsmaller = ["a"]',
            "`smaller` is for an order of two",
        ),
        (
            'order = ["a", "b", "c"]',
            'order = ["a", "b"]\nsmaller = ["c"]',
            "`smaller` names some of the arms of its comparison",
        ),
        (
            'order = ["a", "b", "c"]',
            'order = ["a", "b"]\nsmaller = ["a", "b"]',
            "`smaller` names some of the arms of its comparison",
        ),
        ('title = "t"', 'title = "t"\ncolor = "red"', "color"),
        ('title = "t"', "title = ", "not TOML"),
    ],
)
def test_a_law_that_makes_no_sense_is_refused_with_its_name(was: str, now: str, said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)) as caught:
        parse_law(PLAIN.replace(was, now), "my law")
    assert str(caught.value).startswith("my law: ")


def test_an_unknown_law_is_named_with_those_that_there_are() -> None:
    with pytest.raises(OptionError, match="no law 'L13'; there are L1, L2"):
        load_law("L13")


def test_laws_forbid_unknown_keys() -> None:
    assert Law.model_config["extra"] == "forbid"
