"""The learning curve's law: it finds planted parameters and stays within its bounds."""

import numpy as np
import pytest

from apecache.auto.power_law import fit_power_law, predict

SIZES = [100, 200, 400, 800, 1600]


def test_a_planted_law_is_found_and_continued() -> None:
    recalls = [60 - 400 * size**-0.5 for size in SIZES]
    law = fit_power_law(SIZES, recalls)
    assert law.limit == pytest.approx(60, abs=1)
    assert law.at(16_000) == pytest.approx(60 - 400 * 16_000**-0.5, abs=0.5)


def test_noise_widens_the_interval_and_the_truth_lies_in_it() -> None:
    rng = np.random.default_rng(0)
    widths = []
    for noise in (0.1, 2.0):
        curve = {size: tuple(60 - 400 * size**-0.5 + noise * rng.normal(size=3)) for size in SIZES}
        prediction = predict(curve, [6400])[0]
        widths.append(prediction.high - prediction.low)
        assert prediction.low - 1 <= 60 - 400 * 6400**-0.5 <= prediction.high + 1
    assert widths[1] > 3 * widths[0]


def test_more_data_never_hurts_and_no_recall_exceeds_100() -> None:
    falling = fit_power_law(SIZES, [9, 8, 7, 6, 5])
    assert falling.scale == 0
    assert falling.at(10**6) == pytest.approx(7)
    rising = fit_power_law(SIZES, [10, 30, 50, 70, 90])
    assert rising.limit <= 100
    assert 90 < rising.at(10**9) <= 100


def test_one_size_makes_no_law() -> None:
    with pytest.raises(ValueError, match="two different numbers"):
        fit_power_law([100, 100], [1, 2])
