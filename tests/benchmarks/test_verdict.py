"""Verdicts on made-up outcomes, of which the truth is known."""

import re
from dataclasses import replace

import numpy as np
import pytest

from apecache.fingerprint import Json
from benchmarks.laws.law import Claim
from benchmarks.laws.outcome import Outcome, Ranks, load_outcome, save_outcome
from benchmarks.laws.simulate import KINDS, effects_of, goals_of, simulate
from benchmarks.laws.testable import why_not_testable
from benchmarks.laws.verdict import detectable, judge

N = 400


def outcomes(
    share: float,
    seeds: int,
    spread: float = 0.0,
    start: int = 0,
    n: int = N,
) -> list[Outcome]:
    """Images whose own caption is first in `share` of the cases, another share in each seed."""
    found = []
    for seed in range(seeds):
        draws = np.random.default_rng([start, seed])
        p = share + spread * float(draws.normal())
        ranks = tuple(int(50 * (value >= p)) for value in draws.random(n))
        keys = tuple(f"{row:04d}" for row in range(n))
        retrieval = Ranks(keys=keys, image=ranks, text=ranks, owners=tuple(range(n)))
        chance = {"tr": 1.0, "recall": 1.0}
        found.append(
            Outcome(
                digest=f"{start}-{seed}",
                about={},
                retrieval=retrieval,
                costs={"trained": 10.0 * share},
                chance=chance,
            )
        )
    return found


def claim(**given: object) -> Claim:
    return Claim.model_validate(
        {"weights": {"a": 1.0, "b": -1.0}, "metric": "tr", "smallest": 2.0, **given}
    )


@pytest.mark.parametrize(
    ("first", "second", "equal", "verdict"),
    [
        (0.7, 0.3, False, "held"),
        (0.3, 0.7, False, "broken"),
        (0.52, 0.5, False, "not decided"),
        (0.7, 0.3, True, "broken"),
        (0.5, 0.5, True, "not decided"),
    ],
)
def test_a_difference_is_held_broken_or_open(
    first: float,
    second: float,
    equal: bool,
    verdict: str,
) -> None:
    found = judge(
        claim(equal=equal),
        {"a": outcomes(first, 3, start=1), "b": outcomes(second, 3, start=2)},
    )
    assert found.verdict == verdict
    assert bool(found.why) == (verdict == "not decided")
    assert (found.source, found.n_seeds, found.n_images) == ("seeds and images", 3, N)
    assert found.low is not None
    assert found.high is not None
    assert found.low < found.difference < found.high


def test_a_tie_is_held_where_the_interval_lies_within_what_counts() -> None:
    same = outcomes(0.5, 2)
    found = judge(claim(equal=True), {"a": same, "b": same})
    assert (found.verdict, found.difference) == ("held", 0.0)
    assert found.low is not None
    assert found.high is not None
    assert -1 < found.low < 0 < found.high < 1  # no difference among N images is not "0 to 0"


def test_a_real_difference_that_is_too_small_to_count_breaks_an_order() -> None:
    same = outcomes(0.5, 2)
    assert judge(claim(), {"a": same, "b": same}).verdict == "broken"


@pytest.mark.parametrize(
    ("first", "second", "equal", "smallest", "why"),
    [
        (
            0.52,
            0.5,
            False,
            2.0,
            "the interval holds 0 and differences that would count at this level",
        ),
        (0.5, 0.5, True, 2.0, "the interval reaches differences that would count at this level"),
    ],
)
def test_what_is_left_open_says_why(
    first: float,
    second: float,
    equal: bool,
    smallest: float,
    why: str,
) -> None:
    arms = {"a": outcomes(first, 3, 0.1, start=1), "b": outcomes(second, 3, 0.1, start=2)}
    found = judge(claim(equal=equal, smallest=smallest), arms)
    assert (found.verdict, found.why) == ("not decided", why)


def test_a_difference_that_is_there_and_does_not_count_is_left_open() -> None:
    """1.5 points, where 2 would count."""
    some = outcomes(0.5, 3)
    more = [with_hits(one, 6) for one in some]
    found = judge(claim(), {"a": more, "b": some})
    assert found.low is not None
    assert found.low > 0
    assert found.verdict == "not decided"
    assert found.why == "there is a difference, but it is smaller than what counts, 2.00"


def with_hits(outcome: Outcome, count: int) -> Outcome:
    """So many queries of images more are answered rightly."""
    assert outcome.retrieval is not None
    ranks = list(outcome.retrieval.image)
    for place in [place for place, rank in enumerate(ranks) if rank][:count]:
        ranks[place] = 0
    return replace(outcome, retrieval=replace(outcome.retrieval, image=tuple(ranks)))


def test_what_counts_is_a_tenth_of_the_level_above_chance() -> None:
    """A difference of 1 point counts at a level of 5 and not at one of 50."""
    low = outcomes(0.06, 3, n=2000)
    high = outcomes(0.5, 3, n=2000)
    for level, verdict in ((low, "held"), (high, "not decided")):
        better = [with_hits(one, 24) for one in level]
        assert judge(claim(), {"a": better, "b": level}).verdict == verdict


def test_a_saving_is_held_against_the_published_ratio() -> None:
    """APE trains a quarter of LiT: 40 % is not that, and less than nothing saved is broken."""
    given = claim(metric="trained", smallest=10.0, figures=(25.0, 100.0), published=75.0)
    for trained, verdict in ((0.3, "held"), (0.4, "not decided"), (1.2, "broken")):
        arms = {"a": outcomes(trained, 1), "b": outcomes(1.0, 1)}
        assert judge(given, arms).verdict == verdict
    arms = {"a": outcomes(0.4, 1), "b": outcomes(1.0, 1)}
    assert judge(given, arms).why == "it saves 60.0 %, and 75.0 % are published"


def learnt(share: float, loss: float | None, **given: object) -> list[Outcome]:
    """Arms that trained among 64 candidates."""
    fields = {
        "loss": loss,
        "candidates": 64,
        "samples": 9600,
        "augmentation": "None",
        **given,
    }
    return [replace(one, **fields) for one in outcomes(share, 3)]  # type: ignore[arg-type]


HEADS = outcomes(0.6, 1)[0]


@pytest.mark.parametrize(
    ("second", "heads", "why"),
    [
        (learnt(0.5, 2.0), HEADS, ""),
        (learnt(0.5, 4.0), HEADS, r"b has hardly learnt: its loss is 4.00, and ln\(64\) is 4.16"),
        (learnt(0.5, None), HEADS, "the loss of b was not recorded"),
        (learnt(0.5, 2.0, candidates=0), HEADS, "number of candidates of b was not recorded"),
        (learnt(0.5, 2.0), outcomes(0.0, 1)[0], r"heads alone \(cca\) reach 0.0"),
        (learnt(0.5, 2.0, augmentation="crops"), HEADS, "augmented in different ways"),
        (learnt(0.5, 2.0, samples=4800), HEADS, "the arms saw 4,800 to 9,600 samples"),
        (learnt(0.5, 2.0, samples=4800, law_share=0.5), HEADS, ""),
        (learnt(0.5, 2.0), None, r"what heads alone reach was not measured \(tr\)"),
        (learnt(0.2, 2.0), outcomes(0.99, 1)[0], "the best arm reaches"),
    ],
)
def test_a_comparison_is_testable_only_where_arms_learnt_alike_and_enough(
    second: list[Outcome],
    heads: Outcome | None,
    why: str,
) -> None:
    arms = {"a": learnt(0.3, 2.0), "b": second}
    found = why_not_testable(claim(), arms, heads)
    assert bool(found) == bool(why)
    assert re.search(why, found)
    judged = judge(claim(), arms, found)
    assert (judged.verdict == "not testable") is bool(why)
    # What was measured is reported all the same.
    assert judged.difference is not None


def test_arms_that_are_older_than_recorded_losses_are_not_testable() -> None:
    """Neither their samples nor their losses are known, but their recipe has steps."""
    about: dict[str, Json] = {"recipe": {"schedule": {"epochs": 0, "steps": 80}}}
    old = learnt(0.5, None, samples=0, about=about)
    closed = learnt(0.5, None, samples=0, about={"recipe": {"schedule": {"epochs": 0, "steps": 0}}})
    assert why_not_testable(claim(), {"a": old}, HEADS) == "the loss of a was not recorded"
    assert not why_not_testable(claim(), {"a": closed}, HEADS)


def test_how_far_norms_moved_is_testable_only_where_the_arm_learnt() -> None:
    given = claim(weights={"a": 1.0}, metric="image-shift-rises", smallest=0.2)
    assert not why_not_testable(given, {"a": learnt(0.5, 2.0)}, None)
    assert (
        why_not_testable(given, {"a": learnt(0.5, None)}, None) == "the loss of a was not recorded"
    )
    assert "a has hardly learnt" in why_not_testable(given, {"a": learnt(0.5, 4.0)}, None)
    both = claim(metric="image-shift-rises", smallest=0.2)
    arms = {"a": learnt(0.5, 2.0), "b": learnt(0.5, 2.0, augmentation="crops")}
    assert "augmented in different ways" in why_not_testable(both, arms, None)
    fewer = {"a": learnt(0.5, 2.0), "b": learnt(0.5, 2.0, samples=4800)}
    assert "the arms saw 4,800 to 9,600 samples" in why_not_testable(both, fewer, None)


@pytest.mark.parametrize("metric", ["top1", "unseen"])
def test_accuracies_and_other_languages_are_compared_with_heads_alone_too(metric: str) -> None:
    given = claim(metric=metric)
    arms = {
        "a": [elsewhere(one) for one in learnt(0.4, 2.0)],
        "b": [elsewhere(one) for one in learnt(0.2, 2.0)],
    }
    assert not why_not_testable(given, arms, elsewhere(HEADS))
    # Measured on recall, but not on this metric.
    said = f"what heads alone reach was not measured ({metric})"
    assert why_not_testable(given, arms, HEADS) == said
    assert why_not_testable(given, arms, None) == said
    strong = elsewhere(outcomes(0.99, 1)[0])
    assert "the best arm reaches" in why_not_testable(given, arms, strong)


def elsewhere(outcome: Outcome) -> Outcome:
    """The same ranks among labels and in another language."""
    ranks = outcome.retrieval
    assert ranks is not None
    chance = {**outcome.chance, "top1": 1.0, "unseen": 1.0}
    return replace(outcome, labels=ranks, languages={"de": ranks}, chance=chance)


def test_an_arm_that_is_said_to_be_small_must_train_less_than_the_others() -> None:
    given = claim(smaller=("a",))
    arms = {"a": learnt(0.5, 2.0), "b": learnt(0.3, 2.0)}
    sizes = {"a": 5.6e6, "b": 4.5e6}
    large = {
        arm: [replace(one, costs={"trained": sizes[arm]}) for one in found]
        for arm, found in arms.items()
    }
    why = "the small arm, a, trains 5.6 M parameters and b 4.5 M"
    assert why_not_testable(given, large, HEADS) == why
    assert not why_not_testable(given, {"a": large["b"], "b": large["a"]}, HEADS)
    assert why_not_testable(given, {"a": large["a"], "b": large["a"]}, HEADS)
    assert not why_not_testable(claim(), large, HEADS)
    unknown = {**large, "a": [replace(one, costs={}) for one in large["a"]]}
    assert "was not counted" in why_not_testable(given, unknown, HEADS)


def test_arms_that_train_a_temperature_alone_have_no_loss_to_lower() -> None:
    frozen = [replace(one, costs={"trained": 1.0}) for one in learnt(0.4, 4.1)]
    assert not why_not_testable(claim(), {"a": learnt(0.5, 2.0), "b": frozen}, HEADS)


def test_counts_are_always_testable() -> None:
    arms = {"a": learnt(0.0, 4.1), "b": learnt(0.0, None)}
    assert not why_not_testable(claim(metric="trained"), arms, None)


def test_a_cost_for_each_point_of_recall_is_testable_only_where_the_arms_learnt() -> None:
    given = claim(metric="seconds-per-point", smallest=10.0)
    arms = {"a": learnt(0.5, 2.0), "b": learnt(0.5, 2.0)}
    assert not why_not_testable(given, arms, HEADS)
    assert "hardly learnt" in why_not_testable(given, {**arms, "b": learnt(0.5, 4.1)}, HEADS)
    low = {"a": learnt(0.2, 2.0), "b": learnt(0.2, 2.0)}
    assert "the best arm reaches" in why_not_testable(given, low, outcomes(0.99, 1)[0])


def test_the_simulated_rule_is_rarely_wrong_where_the_truth_is_known() -> None:
    """The committed table has all levels; here one, with few trials."""
    row = simulate(10.0, effect=0.5, trials=10)
    assert row["held"] >= 80
    assert row["broken"] == 0
    assert simulate(3.0, effect=0.2, trials=10)["broken"] <= 10


def test_the_simulated_truth_is_that_of_each_kind_of_claim() -> None:
    """What counts is a tenth of the best arm's level, and of an equality both sides of it differ."""
    order, published, _, equality, _ = KINDS
    assert order.counting_effect(9.0) == pytest.approx(1 / 9)
    assert order.counting_effect(50.0) == pytest.approx(2.0 / 50)
    assert published.counting_effect(9.0) == pytest.approx(0.0451 / 0.9549, rel=1e-3)
    for kind, effect, right, false in (
        (order, -0.2, "broken", ("held",)),
        (order, 0.0, "broken", ("held",)),
        (order, 0.05, None, ()),
        (published, 0.05, "held", ("broken",)),
        (order, 1 / 9, "held", ("broken",)),
        (equality, 0.0, "held", ("broken",)),
        (equality, 0.05, "held", ("broken",)),
        (equality, 1 / 9, None, ("held", "broken")),
        (equality, -0.2, "broken", ("held",)),
        (equality, 0.5, "broken", ("held",)),
    ):
        assert kind.right(9.0, effect) == right, (kind.name, effect)
        assert kind.false(9.0, effect) == false, (kind.name, effect)


def test_the_simulation_covers_each_kind_of_claim_and_its_gate() -> None:
    rows = {kind.name: simulate(30.0, effect=0.5, trials=12, kind=kind) for kind in KINDS}
    gate = rows.pop("order at the gate")
    assert 0 < gate["not testable"] < 100
    assert {row["not testable"] for row in rows.values()} == {0.0}
    assert {name: row["right"] for name, row in rows.items()} == {
        "order": "held",
        "order, published": "held",
        "equality": "broken",
        "difference of differences": "held",
    }
    assert rows["order"]["held"] >= 80
    assert rows["order"]["missed"] == 100 - rows["order"]["held"]
    # The former rule stands beside, also where another process made the row.
    order = replace(KINDS[0])
    assert simulate(30.0, effect=0.5, trials=2, kind=order)["former held"] == 100.0
    assert rows["equality"]["broken"] >= 80
    # The variance of four arms is twice that of two.
    assert rows["difference of differences"]["held"] <= rows["order"]["held"]


def test_the_goals_of_the_simulation_are_of_each_kind_and_of_a_named_effect() -> None:
    rows = [
        simulate(level, effect=effect, trials=2, kind=kind)
        for kind in KINDS
        for level in (1.0, 10.0)
        for effect in effects_of(kind, level)
    ]
    for row in rows:
        if row["claim"] == "equality":
            row |= {"false held": 7.5 if row["false held"] != "" else "", "missed": 12.5}
    goals = {goal.name: goal for goal in goals_of(rows)}
    assert len(goals) == 3 * len(KINDS) + 1
    false_held = goals["equality: false `held`, per cent, at the worst level"]
    assert (false_held.value, false_held.met) == (7.5, False)
    power = "effects of +50 % at 10 points above chance that are missed, per cent"
    assert goals[f"equality: {power}"].value == 12.5


def test_arms_that_reach_little_do_not_break_an_order_by_being_close() -> None:
    """Of 2 to 3 per cent no difference can be 5; a tenth of what was reached above chance counts."""
    given = {"a": outcomes(0.03, 3, start=1, n=2000), "b": outcomes(0.02, 3, start=2, n=2000)}
    found = judge(claim(smallest=5.0, figures=(40.0, 30.0), published=10.0), given)
    assert 0 < found.difference < found.high < 5
    assert found.verdict == "held"
    same = {"a": given["a"], "b": given["a"]}
    assert judge(claim(smallest=5.0), same).verdict == "broken"
    assert (
        judge(claim(smallest=5.0, figures=(40.0, 20.0), published=20.0), same).verdict == "broken"
    )
    wide = {"a": outcomes(0.03, 3, start=1, n=300), "b": outcomes(0.03, 3, start=5, n=300)}
    assert judge(claim(smallest=5.0, equal=True), wide).verdict == "not decided"


def test_nothing_is_decided_where_nothing_was_learnt() -> None:
    found = judge(claim(), {"a": outcomes(0.0, 3, start=1), "b": outcomes(0.0, 3, start=2)})
    assert found.verdict == "not decided"
    assert "above chance" in found.why


def test_seeds_that_disagree_widen_the_interval_and_one_seed_speaks_of_images_alone() -> None:
    calm = judge(claim(), {"a": outcomes(0.6, 3, start=1), "b": outcomes(0.4, 3, start=2)})
    wild = judge(claim(), {"a": outcomes(0.6, 3, 0.2, start=1), "b": outcomes(0.4, 3, start=2)})
    assert wild.high - wild.low > 2 * (calm.high - calm.low)
    assert (
        judge(claim(), {"a": outcomes(0.6, 1), "b": outcomes(0.4, 1, start=2)}).source == "images"
    )


def test_intervals_hold_the_truth_in_about_95_of_100_experiments() -> None:
    true = 10.0
    within = 0
    for trial in range(40):
        arms = {
            "a": outcomes(0.5, seeds=3, spread=0.03, start=2 * trial, n=200),
            "b": outcomes(0.4, seeds=3, spread=0.03, start=2 * trial + 1, n=200),
        }
        found = judge(claim(), arms)
        within += found.low <= true <= found.high
    assert 34 <= within <= 40


def test_an_arm_that_is_the_same_for_all_seeds_counts_for_each() -> None:
    found = judge(claim(), {"a": outcomes(0.7, 3, start=1), "b": outcomes(0.3, 1, start=2)})
    assert (found.n_seeds, found.verdict) == (3, "held")


def test_what_is_counted_is_exact() -> None:
    found = judge(
        claim(metric="trained", smallest=10.0),
        {"a": outcomes(0.1, 1), "b": outcomes(0.4, 1)},
    )
    assert (found.verdict, found.difference, found.source) == ("held", 75.0, "counted, exact")
    assert detectable(claim(metric="trained"), 100, 3) == 0.0


def test_more_images_and_more_seeds_detect_less() -> None:
    assert detectable(claim(), 1000, 3) < detectable(claim(), 100, 3)
    assert detectable(claim(), 1000, 3) < detectable(claim(), 1000, 2)
    assert 3.0 < detectable(claim(), 1000, 3) < 8.0


def test_an_outcome_is_read_as_it_was_written(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (one,) = outcomes(0.5, 1)
    save_outcome(one, tmp_path)
    again = load_outcome(one.digest, tmp_path)
    assert again == one
    assert again.value("tr") == one.value("tr")
    assert load_outcome("another", tmp_path) is None


def test_seeds_that_agree_leave_the_variance_over_images() -> None:
    first = outcomes(0.6, 1, start=1)[0]
    second = outcomes(0.4, 1, start=2)[0]
    found = judge(claim(), {"a": [first] * 3, "b": [second] * 3})
    hits = [np.array(one.retrieval.image) == 0 for one in (first, second) if one.retrieval]
    expected = 1.96 * 100 * np.std(hits[0].astype(float) - hits[1]) / np.sqrt(N)
    assert found.high - found.difference == pytest.approx(expected, rel=0.1)
