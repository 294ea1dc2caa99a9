"""Ways to read ranks: intervals by bootstrap over images, folds of 1,000 images as published, language by language."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import DataError
from apecache.evaluate.relevance import Relevance
from apecache.evaluate.retrieval import KS, RetrievalReport, image_to_text_ranks, retrieval_report, text_to_image_ranks

RESAMPLES, LEVEL = 1000, 0.95
Measure = Callable[[Tensor, Tensor, Tensor, Sequence[int], Relevance | None], RetrievalReport]


@dataclass(frozen=True)
class Intervals:
    """For each K the lower and upper end of a 95 % interval of the recall, in per cent, both ways, and the medians of
    the ranks (1 is best)."""

    image_to_text: dict[int, tuple[float, float]]
    text_to_image: dict[int, tuple[float, float]]
    median_rank_image_to_text: float
    median_rank_text_to_image: float


def bootstrap_intervals(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    seed: int = 0,
    relevance: Relevance | None = None,
) -> Intervals:
    """Percentile intervals over 1,000 resamples of the images, each with its captions (captions of one image are not
    independent); the candidates stay as they are. Arguments as `retrieval_report` takes them."""
    to_text = image_to_text_ranks(image, text, image_of_text, relevance).cpu().numpy()
    to_image = text_to_image_ranks(image, text, image_of_text, relevance).cpu().numpy()
    owner, n = image_of_text.cpu().numpy(), len(image)
    chance = np.random.default_rng(seed)
    draws = chance.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    n_captions = np.bincount(owner, minlength=n)

    def ends(hits: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
        shares = 100 * (draws @ hits) / (draws @ counts)
        low, high = np.quantile(shares, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)

    forth = {k: ends((to_text < k).astype(float), np.ones(n)) for k in ks}
    back = {k: ends(np.bincount(owner, to_image < k, minlength=n).astype(float), n_captions.astype(float)) for k in ks}
    return Intervals(forth, back, 1 + float(np.median(to_text)), 1 + float(np.median(to_image)))


def folded_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    fold_images: int = 1000,
    ks: Sequence[int] = KS,
    measure: Measure = retrieval_report,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Means over folds of so many images in their order, each with its own captions as candidates: the "1k" figures of
    COCO, five folds of its 5,000 test images (Karpathy & Fei-Fei 2015, section 4.1). A rest of fewer is left out.
    `measure`: what each fold is measured by. `relevance`: as `retrieval_report` takes it; within each fold.

    Raises:
        DataError: fewer images than one fold.
    """
    n_folds = len(image) // fold_images
    if n_folds < 1:
        raise DataError(f"{len(image)} images are fewer than one fold of {fold_images}; give a smaller --folds")
    reports = []
    for fold in range(n_folds):
        first = fold * fold_images
        texts = torch.nonzero((image_of_text >= first) & (image_of_text < first + fold_images)).squeeze(1)
        owners = image_of_text[texts] - first
        images = slice(first, first + fold_images)
        right = None if relevance is None else relevance.select(owners, images, texts)
        reports.append(measure(image[images], text[texts], owners, ks, right))
    return _mean(reports)


def language_reports(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    languages: Sequence[str],
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> Mapping[str, RetrievalReport]:
    """For each language its captions alone, and the images that have one, as queries and candidates; sorted by name.
    `relevance`: as `retrieval_report` takes it; captions of other languages make no answer right."""
    reports = {}
    for language in sorted(set(languages)):
        mask = torch.tensor([other == language for other in languages], device=text.device)
        images, owners = torch.unique(image_of_text[mask], return_inverse=True)
        right = None if relevance is None else relevance.select(owners, images, mask)
        reports[language] = retrieval_report(image[images], text[mask], owners, ks, right)
    return reports


def _mean(reports: Sequence[RetrievalReport]) -> RetrievalReport:
    def mean(name: str) -> dict[int, float]:
        tables = [getattr(report, name) for report in reports]
        return {k: sum(table[k] for table in tables) / len(tables) for k in tables[0]}

    return RetrievalReport(
        mean("image_to_text"),
        mean("text_to_image"),
        reports[0].n_images,
        round(sum(report.n_texts for report in reports) / len(reports)),
        mean("chance_image_to_text"),
        mean("chance_text_to_image"),
    )
