"""Intervals, folds and languages: each against its definition written out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest

from apecache.errors import DataError
from apecache.metrics.protocols import (
    folded_report,
    measure_languages,
    measure_retrieval,
    retrieval_hits,
    retrieval_intervals,
)
from apecache.metrics.retrieval import retrieval_report


def pairs(
    n_images: int,
    noise: float,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with one to four captions near them."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n_images, 16, generator=generator), dim=1)
    owner = torch.repeat_interleave(
        torch.arange(n_images),
        torch.randint(1, 5, (n_images,), generator=generator),
    )
    text = F.normalize(
        image[owner] + noise * torch.randn(len(owner), 16, generator=generator),
        dim=1,
    )
    return image, text, owner


def test_intervals_hold_the_recall_and_narrow_with_the_number_of_images() -> None:
    widths = []
    for n_images in (50, 800):
        image, text, owner = pairs(n_images, 0.6)
        report = retrieval_report(image, text, owner)
        intervals = retrieval_intervals(image, text, owner)
        both = (
            (report.image_to_text, intervals.image_to_text),
            (report.text_to_image, intervals.text_to_image),
        )
        for found, ends in both:
            for k, (low, high) in ends.items():
                assert low <= found[k] <= high
        low, high = intervals.image_to_text[5]
        widths.append(high - low)
    assert widths[1] < widths[0] / 2


def test_the_interval_is_that_of_a_binomial_where_images_have_one_caption() -> None:
    """Half of 400 queries hit: two standard errors are 5 points on each side."""
    image = F.normalize(torch.randn(400, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    text = image.clone()
    text[::2] = -image[::2]
    low, high = retrieval_intervals(image, text, torch.arange(400)).text_to_image[1]
    assert (low, high) == pytest.approx((45.1, 54.9), abs=0.8)


def test_captions_of_one_image_are_drawn_together() -> None:
    """Ten images with 50 equal captions each: as uncertain as ten queries, not as 500."""
    image = F.normalize(torch.randn(10, 32, generator=torch.Generator().manual_seed(1)), dim=1)
    owner = torch.repeat_interleave(torch.arange(10), 50)
    text = torch.where((owner % 2 == 0).unsqueeze(1), image[owner], -image[owner])
    low, high = retrieval_intervals(image, text, owner).text_to_image[1]
    assert high - low > 50


def test_median_ranks_count_from_one() -> None:
    image, text, owner = pairs(60, 0.0)
    intervals = retrieval_intervals(image, text, owner)
    assert (intervals.median_rank_image_to_text, intervals.median_rank_text_to_image) == (1.0, 1.0)


def test_where_every_query_hits_or_none_does_the_interval_is_wilsons() -> None:
    """The images count, not the captions: 60 of 60 leaves room for 6 % of misses. Student's
    quantile is wider."""
    least = float(100 * binomtest(60, 60).proportion_ci(method="wilson").low)
    image, text, owner = pairs(60, 0.0)
    for value in retrieval_intervals(image, text, owner).text_to_image.values():
        assert value == pytest.approx((least, 100.0), abs=0.4)
    assert retrieval_intervals(image, -image[owner], owner).text_to_image[1] == pytest.approx(
        (0, 100 - least),
        abs=0.4,
    )


def test_the_interval_of_the_mean_recall_holds_it() -> None:
    vectors = pairs(80, 0.9)
    low, high = retrieval_intervals(*vectors).mean_recall
    assert low < retrieval_report(*vectors).mean_recall < high


def test_folds_are_means_of_the_reports_of_each() -> None:
    image, text, owner = pairs(250, 1.0)
    folds = []
    for fold in range(2):
        mask = (owner >= 100 * fold) & (owner < 100 * fold + 100)
        folds.append(
            retrieval_report(
                image[100 * fold : 100 * fold + 100],
                text[mask],
                owner[mask] - 100 * fold,
            )
        )
    found = folded_report(image, text=text, image_of_text=owner, fold_images=100)
    for k in (1, 5, 10):
        assert found.image_to_text[k] == pytest.approx(
            np.mean([fold.image_to_text[k] for fold in folds])
        )
        assert found.text_to_image[k] == pytest.approx(
            np.mean([fold.text_to_image[k] for fold in folds])
        )
    assert found.n_images == 100
    with pytest.raises(DataError, match="fewer than one fold of 300"):
        folded_report(image, text=text, image_of_text=owner, fold_images=300)


def test_one_ranking_gives_report_intervals_and_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    from apecache.metrics import retrieval

    n_calls = 0
    rank = retrieval.image_to_text_ranks

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        nonlocal n_calls
        n_calls += 1
        return rank(*arguments, **options)  # type: ignore[arg-type]

    image, text, owner = pairs(40, 0.8)
    expected = retrieval_report(image, text, owner)
    intervals = retrieval_intervals(image, text, owner)
    hits = retrieval_hits(image, text, owner)
    monkeypatch.setattr(retrieval, "image_to_text_ranks", counted)
    measured = measure_retrieval(image, text, owner)
    assert n_calls == 1
    assert measured.report == expected
    assert measured.intervals == intervals
    for k, values in hits.image_to_text.items():
        assert np.array_equal(measured.hits.image_to_text[k], values)


def test_a_language_is_measured_among_its_own_captions() -> None:
    image, text, owner = pairs(40, 0.8)
    languages = ["de" if row % 3 else "en" for row in range(len(text))]
    measured = measure_languages(image, text=text, image_of_text=owner, languages=languages)
    found = {language: measurement.report for language, measurement in measured.items()}
    assert list(found) == ["de", "en"]
    for language, report in found.items():
        mask = torch.tensor([other == language for other in languages])
        kept = sorted(set(owner[mask].tolist()))
        wanted = retrieval_report(
            image[kept],
            text[mask],
            torch.tensor([kept.index(i) for i in owner[mask].tolist()]),
        )
        assert report == wanted
        sure = measured[language].intervals
        assert all(
            low <= wanted.text_to_image[k] <= high for k, (low, high) in sure.text_to_image.items()
        )


def test_recalls_are_those_of_clip_benchmark() -> None:
    """On embeddings without ties: its recall counts a hit once per image, as ours does."""
    benchmark = pytest.importorskip(
        "clip_benchmark.metrics.zeroshot_retrieval",
        reason="not installed",
    )
    image, text, owner = pairs(30, 0.9)
    scores = text @ image.T
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(text)), owner] = True
    report = retrieval_report(image, text, owner)
    for k in (1, 5, 10):
        back = (benchmark.recall_at_k(scores, positive, k) > 0).float().mean().item()
        forth = (benchmark.recall_at_k(scores.T, positive.T, k) > 0).float().mean().item()
        assert report.text_to_image[k] == pytest.approx(100 * back, abs=1e-4)
        assert report.image_to_text[k] == pytest.approx(100 * forth, abs=1e-4)
