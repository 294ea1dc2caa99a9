"""Intervals hold the truth as often as they say; p-values are right where nothing differs."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest, kstest
from scipy.stats import t as student

from apecache.evaluate.comparison import METRICS, MetricDifference, compare_hits
from apecache.metrics.statistics import (
    Estimate,
    RetrievalHits,
    accuracy_interval,
    count_interval,
    estimate_from_recalls,
    estimate_recall,
    satterthwaite,
    share_interval,
    sign_flip_p_value,
    smallest_variance,
)

CAPTIONS = 3
TERM = (("text_to_image", 1),)
"""R@1 text to image, with several captions of each image."""


def hits_of(chances: NDArray[np.float64], generator: np.random.Generator) -> RetrievalHits:
    """Captions of image i hit with the probability `chances[i]`, and so does the image's own
    query."""
    n_images = len(chances)
    forth = (generator.random(n_images) < chances).astype(float)
    back = generator.binomial(CAPTIONS, chances).astype(float)
    return RetrievalHits(
        image_to_text=dict.fromkeys((1, 5, 10), forth),
        text_to_image=dict.fromkeys((1, 5, 10), back),
        captions=np.full(n_images, float(CAPTIONS)),
    )


def simulate(
    n_seeds: int,
    generator: np.random.Generator,
    n_images: int = 150,
    spread: float = 0.02,
    level: float = 0.3,
) -> list[RetrievalHits]:
    """Images differ in how easy they are, and seeds shift all of them; the true recall is
    `level`."""
    easy = generator.beta(2 * level, 2 * (1 - level), n_images)
    return [
        hits_of(np.clip(easy + spread * generator.standard_normal(), 0, 1), generator)
        for _ in range(n_seeds)
    ]


def seeds_alone(runs: Sequence[RetrievalHits]) -> tuple[float, float]:
    """The interval of Student over seeds: what the images add is left out."""
    values = [run.value(TERM) for run in runs]
    half = student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return fmean(values) - half, fmean(values) + half


@pytest.mark.parametrize("n_seeds", [1, 2, 3, 5])
def test_intervals_hold_the_truth_in_about_95_of_100_experiments(n_seeds: int) -> None:
    """600 experiments have a standard error of 0.9 points; the band is four of them below, and ends
    at 100 above, because the variance that images and seeds share is counted twice."""
    generator = np.random.default_rng(0)
    experiments = [
        simulate(n_seeds, generator, spread=0.0 if n_seeds == 1 else 0.02) for _ in range(600)
    ]
    estimates = [estimate_recall(runs, TERM) for runs in experiments]
    assert 0.914 <= np.mean([one.low <= 30.0 <= one.high for one in estimates]) <= 1.0


def test_an_interval_over_seeds_alone_holds_the_truth_far_less_often() -> None:
    generator = np.random.default_rng(0)
    ends = [seeds_alone(simulate(5, generator)) for _ in range(300)]
    assert np.mean([low <= 30.0 <= high for low, high in ends]) < 0.8


def test_intervals_are_no_wider_than_they_need_be() -> None:
    """Against the spread of the estimates themselves, over many draws of images and seeds."""
    generator = np.random.default_rng(1)
    estimates = [estimate_recall(simulate(5, generator), TERM) for _ in range(400)]
    spread = np.std([one.value for one in estimates], ddof=1)
    claimed = np.sqrt(np.mean([one.seed_variance + one.image_variance for one in estimates]))
    assert 0.9 < claimed / spread < 1.4


def test_seeds_that_agree_are_as_uncertain_as_one_of_them() -> None:
    """Five seeds of a closed form are the same model: the images stay few."""
    (run,) = simulate(1, np.random.default_rng(2))
    one = estimate_recall([run], TERM)
    five = estimate_recall([run] * 5, TERM)
    assert five.seed_variance == 0
    assert (five.low, five.high) == pytest.approx((one.low, one.high))
    assert five.high - five.low > 5


def test_seeds_that_disagree_widen_the_interval() -> None:
    generator = np.random.default_rng(11)
    easy = generator.beta(0.6, 1.4, 2000)
    steady = estimate_recall([hits_of(easy, generator) for _ in range(3)], TERM)
    shifted = [hits_of(np.clip(easy + shift, 0, 1), generator) for shift in (-0.1, 0.0, 0.1)]
    apart = estimate_recall(shifted, TERM)
    assert apart.high - apart.low > 3 * (steady.high - steady.low)
    assert apart.seed_variance == pytest.approx(
        np.var([run.value(TERM) for run in shifted], ddof=1) / 3
    )


def test_the_variance_over_images_is_the_limit_of_the_bootstrap() -> None:
    generator = np.random.default_rng(3)
    (run,) = simulate(1, generator, n_images=300)
    draws = generator.multinomial(300, np.full(300, 1 / 300), 4000)
    values = 100 * (draws @ run.text_to_image[1]) / (draws @ run.captions)
    found = estimate_recall([run], TERM).image_variance
    assert found == pytest.approx(
        values.var(ddof=1),
        rel=0.15,
    )  # 4,000 draws: 2.2 % of standard error


def test_without_single_answers_the_interval_is_wider_and_never_narrower() -> None:
    generator = np.random.default_rng(4)
    terms = METRICS["mean of all"]
    for n_seeds in (1, 3):
        runs = simulate(n_seeds, generator)
        exact = estimate_recall(runs, terms)
        bound = estimate_from_recalls([run.value(terms) for run in runs], 150)
        assert bound.value == pytest.approx(exact.value)
        assert (
            bound.image_variance >= 0.99 * exact.image_variance
        )  # n / (n - 1) stands in one of them alone


@pytest.mark.parametrize("n", [4, 50, 1000])
def test_no_hit_is_not_0_to_0_and_no_miss_not_100_to_100(n: int) -> None:
    none = RetrievalHits(
        image_to_text={1: np.zeros(n)},
        text_to_image={1: np.zeros(n)},
        captions=np.full(n, float(CAPTIONS)),
    )
    every = RetrievalHits(
        image_to_text={1: np.ones(n)},
        text_to_image={1: none.captions},
        captions=none.captions,
    )
    for way in ("image_to_text", "text_to_image"):
        low, high = ends_of(estimate_recall([none] * 3, [(way, 1)]))
        assert low == 0
        assert high >= count_interval(0, n)[1] > 0
        low, high = ends_of(estimate_recall([every] * 3, [(way, 1)]))
        assert high == pytest.approx(100)
        assert low <= count_interval(n, n)[0] < 100


def ends_of(estimate: Estimate) -> tuple[float, float]:
    return estimate.low, estimate.high


@pytest.mark.parametrize(("n_hits", "n"), [(0, 10), (10, 10), (3, 10), (500, 1000)])
def test_counts_have_wilsons_interval_and_so_have_single_captions(n_hits: int, n: int) -> None:
    ends = binomtest(n_hits, n).proportion_ci(method="wilson")
    assert count_interval(n_hits, n) == pytest.approx((100 * ends.low, 100 * ends.high))
    assert accuracy_interval(100 * n_hits / n, n) == count_interval(n_hits, n)
    share = n_hits / n
    found = share_interval(
        100 * share,
        1e4 * share * (1 - share) / n,
        degrees=float("1e9"),
        n_images=n,
        n_queries=n,
    )
    assert found == pytest.approx(count_interval(n_hits, n), abs=1e-6)


def test_one_image_and_one_query_have_an_interval() -> None:
    hit = RetrievalHits(
        image_to_text={1: np.ones(1)},
        text_to_image={1: np.ones(1)},
        captions=np.ones(1),
    )
    low, high = ends_of(estimate_recall([hit], TERM))
    assert 0 < low < 50 < high <= 100 + 1e-9


def test_degrees_of_freedom_are_those_of_the_larger_variance() -> None:
    assert satterthwaite([(4.0, 4), (0.0, 999)]) == pytest.approx(4)
    assert satterthwaite([(0.0, 4), (4.0, 999)]) == pytest.approx(999)
    assert 4 < satterthwaite([(1.0, 4), (1.0, 999)]) < 999
    assert satterthwaite([(0.0, 0), (2.0, 99)]) == pytest.approx(99)


# --- two sides ------------------------------------------------------------------------------------


def compared(
    a: Sequence[RetrievalHits],
    b: Sequence[RetrievalHits],
    metric: str = "mean R@1",
) -> MetricDifference:
    return compare_hits(a, b, metric=metric, chance=1.0)


def test_a_known_difference_is_found_on_the_same_images() -> None:
    """Ten points on 400 images; the easy and the hard ones cancel, because differences are
    paired."""
    generator = np.random.default_rng(5)
    easy = generator.beta(0.6, 1.4, 400) * 0.85
    better = hits_of(easy + 0.1, generator)
    worse = hits_of(easy, generator)
    found = compared([better], [worse])
    assert found.low < 10 < found.high
    assert found.low > 0
    assert found.p_value < 0.01


def test_swapping_the_sides_turns_the_difference_and_keeps_p() -> None:
    generator = np.random.default_rng(6)
    one, two, three = simulate(3, generator)
    for a, b in (([one], [two]), ([one, two], [three])):
        forth = compared(a, b)
        back = compared(b, a)
        assert (back.difference, back.low, back.high) == pytest.approx(
            (-forth.difference, -forth.high, -forth.low)
        )
        assert back.p_value == pytest.approx(forth.p_value)
        assert (back.value_a, back.value_b) == (forth.value_b, forth.value_a)


def test_identical_runs_have_p_1_and_an_interval_that_is_not_0_to_0() -> None:
    (run,) = simulate(1, np.random.default_rng(7))
    for a, b in (([run], [run]), ([run, run], [run, run])):
        found = compared(a, b)
        assert (found.difference, found.p_value) == (0, 1)
        assert found.low < 0 < found.high
        assert found.high >= 1.9 * smallest_variance(150) ** 0.5


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_where_nothing_differs_p_is_uniform(n_seeds: int) -> None:
    """Answers of both sides are draws from the same probabilities. 5 % of p-values below 0.05 have
    a standard error of 1 point in 500 experiments; with several seeds p is cautious, so that only
    too small ones are a fault."""
    generator = np.random.default_rng(8)
    p_values = []
    for _ in range(500):
        runs = simulate(2 * n_seeds, generator, n_images=60, spread=0.0 if n_seeds == 1 else 0.02)
        p_values.append(compared(runs[:n_seeds], runs[n_seeds:]).p_value)
    assert np.mean([p < 0.05 for p in p_values]) <= 0.09
    assert np.mean([p < 0.5 for p in p_values]) <= 0.58
    if n_seeds == 1:
        assert np.mean([p < 0.05 for p in p_values]) >= 0.02
        assert (
            kstest(p_values, "uniform").statistic < 0.1
        )  # p has steps, and 500 draws reach 0.07 once in a hundred


@pytest.mark.parametrize("n_seeds", [1, 3])
def test_intervals_of_differences_hold_the_truth(n_seeds: int) -> None:
    generator = np.random.default_rng(9)
    within = []
    for _ in range(400):
        runs = simulate(2 * n_seeds, generator, n_images=80, spread=0.0 if n_seeds == 1 else 0.03)
        found = compared(runs[:n_seeds], runs[n_seeds:])
        within.append(found.low <= 0 <= found.high)
    assert np.mean(within) >= 0.91  # 95 % less four standard errors of 1.1 points


def test_seeds_that_disagree_widen_the_interval_of_a_difference() -> None:
    generator = np.random.default_rng(10)
    easy = generator.beta(0.6, 1.4, 150)
    steady = [hits_of(easy, generator) for _ in range(6)]
    shifted = [hits_of(np.clip(easy + shift, 0, 1), generator) for shift in (-0.3, 0.0, 0.3) * 2]
    calm = compared(steady[:3], steady[3:])
    wild = compared(shifted[:3], shifted[3:])
    assert wild.high - wild.low > 2 * (calm.high - calm.low)


def test_few_differences_are_tried_in_all_signs() -> None:
    assert sign_flip_p_value(np.array([1.0, 0.0, 0.0])) == 1
    assert sign_flip_p_value(np.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])) == pytest.approx(2 / 32)
    assert sign_flip_p_value(np.array([1.0, 1.0, 1.0, 1.0, -1.0])) == pytest.approx(12 / 32)
    assert sign_flip_p_value(np.array([0.1, 0.2, -0.3])) == 1  # the sum is 0 but for rounding


def test_drawn_signs_agree_with_the_binomial_of_equal_differences() -> None:
    """40 of 60 images are better on one side: McNemar's exact test is the same question."""
    differences = np.concatenate([np.ones(40), -np.ones(20)])
    exact = binomtest(40, 60).pvalue
    assert sign_flip_p_value(differences) == pytest.approx(
        exact,
        abs=0.004,
    )  # 10,000 draws: 0.0012 of standard error


def test_the_answers_of_some_images_make_up_those_of_all() -> None:
    hits = simulate(1, np.random.default_rng(0))[0]
    first = np.arange(hits.n_images) < 50
    few = hits.among(first)
    many = hits.among(~first)
    assert (few.n_images, many.n_images) == (50, hits.n_images - 50)
    joined = (50 * few.value(TERM) + many.n_images * many.value(TERM)) / hits.n_images
    assert joined == pytest.approx(hits.value(TERM))
    assert few.value(TERM) != many.value(TERM)


def test_a_higher_level_widens_the_interval_of_a_difference() -> None:
    generator = np.random.default_rng(0)
    runs = [simulate(3, generator), simulate(3, generator)]
    usual = compare_hits(*runs, metric="mean R@1", chance=1.0)
    wider = compare_hits(*runs, metric="mean R@1", chance=1.0, level=0.99)
    assert wider.low < usual.low < usual.high < wider.high
    assert wider.difference == usual.difference
