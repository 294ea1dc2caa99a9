"""The decision keeps the simpler head after luck, and takes one that is truly better."""

from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from apecache.auto.decision import decide, kept_candidate
from apecache.metrics.statistics import RetrievalHits

N_TRIALS = 30
N_SEARCHES = 60
LUCK = 4.0
"""Standard deviation over seeds, in points of R@1."""
N_DEV = 500
N_CONFIRM = 500


class Simulated:
    """Heads whose recall is that of their recipe, plus the luck of their seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.hardness = {
            "dev": self.rng.normal(size=N_DEV),
            "confirm": self.rng.normal(size=N_CONFIRM),
        }

    def fitted(self, recall: float) -> float:
        """The quality of one fit: a share of images."""
        return (recall + LUCK * self.rng.normal()) / 100

    def answered(self, quality: float, images: str) -> RetrievalHits:
        """The answers of a fit; images that are hard for one fit are hard for the others."""
        hardness = self.hardness[images]
        noisy = hardness + 0.7 * self.rng.normal(size=len(hardness))
        scale = np.sqrt(1 + 0.7**2)
        threshold = scale * NormalDist().inv_cdf(quality)
        hits = (noisy < threshold).astype(np.float64)
        return RetrievalHits(
            image_to_text={1: hits},
            text_to_image={1: hits},
            captions=np.ones(len(hits)),
        )


def value(hits: RetrievalHits) -> float:
    return hits.value((("image_to_text", 1),))


def lucky_search(seed: int) -> tuple[list[RetrievalHits], list[RetrievalHits], list[RetrievalHits]]:
    """Thirty trials as good as the default, of which dev chooses the luckiest.

    Returns:
        Answers of the default, of the trial with the seed that chose it, and of the trial with
        other seeds.
    """
    simulated = Simulated(seed)
    default = [simulated.answered(simulated.fitted(30), "confirm") for _ in range(3)]
    trials = [simulated.fitted(30) for _ in range(N_TRIALS)]
    best = max(trials, key=lambda quality: value(simulated.answered(quality, "dev")))
    same_seed = [simulated.answered(best, "confirm")]
    other_seeds = [simulated.answered(simulated.fitted(30), "confirm") for _ in range(3)]
    return default, same_seed, other_seeds


def test_a_lucky_trial_is_not_chosen() -> None:
    by_its_own_seed = 0
    by_other_seeds = 0
    for seed in range(N_SEARCHES):
        default, same_seed, other_seeds = lucky_search(seed)
        first = decide({"default": default[:1], "sweep": same_seed})
        by_its_own_seed += first[0].replaced
        by_other_seeds += decide({"default": default, "sweep": other_seeds})[0].replaced
    # One seed on each side, the one that was chosen for its luck: wrong most of the time.
    assert by_its_own_seed > N_SEARCHES / 2
    assert by_other_seeds <= 0.1 * N_SEARCHES


def test_a_better_head_is_chosen() -> None:
    n_chosen = 0
    for seed in range(20):
        simulated = Simulated(seed)
        default = [simulated.answered(0.30 + 0.005 * i, "confirm") for i in range(3)]
        better = [simulated.answered(0.42 + 0.005 * i, "confirm") for i in range(3)]
        n_chosen += decide({"default": default, "sweep": better})[0].replaced
    assert n_chosen >= 18


def made_of(hits: NDArray[np.float64]) -> RetrievalHits:
    return RetrievalHits(
        image_to_text={1: hits},
        text_to_image={1: hits},
        captions=np.ones(len(hits)),
    )


def test_each_candidate_is_compared_with_the_simplest_that_is_left() -> None:
    weak = made_of(np.repeat([1.0, 0.0], [100, 300]))
    strong = made_of(np.repeat([1.0, 0.0], [200, 200]))
    decisions = decide({"closed": [weak], "default": [strong], "sweep": [weak], "all": [strong]})
    assert [decision.against for decision in decisions] == ["closed", "default", "default"]
    assert [decision.replaced for decision in decisions] == [True, False, False]
    assert kept_candidate(decisions) == "default"


def test_more_comparisons_need_more_evidence() -> None:
    rng = np.random.default_rng(0)
    base = made_of((rng.random(400) < 0.3).astype(np.float64))
    other = made_of((rng.random(400) < 0.37).astype(np.float64))
    one = decide({"a": [base], "b": [other]})[0]
    four = decide({"a": [base], "b": [other], "c": [base], "d": [base], "e": [base]})[0]
    assert one.level == pytest.approx(0.95)
    assert four.level == pytest.approx(0.9875)
    assert four.difference.low < one.difference.low
    assert four.difference.difference == one.difference.difference
