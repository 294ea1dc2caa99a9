"""Ways to read ranks: intervals over images, folds of 1,000 images as published, language by
language."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import DataError
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import (
    KS,
    RetrievalReport,
    image_to_text_ranks,
    retrieval_report,
    text_to_image_ranks,
)
from apecache.metrics.statistics import WAYS, Ends, RetrievalHits, Term, estimate_recall

Measure = Callable[[Tensor, Tensor, Tensor, Sequence[int], Relevance | None], RetrievalReport]


@dataclass(frozen=True, kw_only=True)
class Intervals:
    """For each K the lower and upper end of a 95 % interval of the recall, in per cent, both ways,
    that of the mean of all recalls, and the medians of the ranks (1 is best)."""

    image_to_text: dict[int, Ends]
    text_to_image: dict[int, Ends]
    mean_recall: Ends
    median_rank_image_to_text: float
    median_rank_text_to_image: float


def retrieval_hits(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalHits:
    """Collect the hits of each image and of its captions. Arguments as `retrieval_report` takes
    them."""
    to_text = (
        image_to_text_ranks(image, text=text, image_of_text=image_of_text, relevance=relevance)
        .cpu()
        .numpy()
    )
    to_image = (
        text_to_image_ranks(image, text=text, image_of_text=image_of_text, relevance=relevance)
        .cpu()
        .numpy()
    )
    return _hits_of_ranks(to_text, to_image=to_image, owner=image_of_text.cpu().numpy(), ks=ks)


def retrieval_intervals(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> Intervals:
    """Compute the intervals of one run over images, each with its captions (captions of one image
    are not independent).

    The method is that of `apecache.metrics.statistics`. Arguments as `retrieval_report` takes them.
    """
    to_text = (
        image_to_text_ranks(image, text=text, image_of_text=image_of_text, relevance=relevance)
        .cpu()
        .numpy()
    )
    to_image = (
        text_to_image_ranks(image, text=text, image_of_text=image_of_text, relevance=relevance)
        .cpu()
        .numpy()
    )
    hits = _hits_of_ranks(to_text, to_image=to_image, owner=image_of_text.cpu().numpy(), ks=ks)

    def ends(*terms: Term) -> Ends:
        estimate = estimate_recall([hits], terms)
        return estimate.low, estimate.high

    return Intervals(
        image_to_text={k: ends(("image_to_text", k)) for k in ks},
        text_to_image={k: ends(("text_to_image", k)) for k in ks},
        mean_recall=ends(*product(WAYS, ks)),
        median_rank_image_to_text=1 + float(np.median(to_text)),
        median_rank_text_to_image=1 + float(np.median(to_image)),
    )


def _hits_of_ranks(
    to_text: NDArray[np.int64],
    to_image: NDArray[np.int64],
    owner: NDArray[np.int64],
    ks: Sequence[int],
) -> RetrievalHits:
    n_images = len(to_text)
    return RetrievalHits(
        image_to_text={k: (to_text < k).astype(np.float64) for k in ks},
        text_to_image={
            k: np.bincount(owner, weights=to_image < k, minlength=n_images).astype(np.float64)
            for k in ks
        },
        captions=np.bincount(owner, minlength=n_images).astype(np.float64),
    )


def folded_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    fold_images: int = 1000,
    ks: Sequence[int] = KS,
    measure: Measure = retrieval_report,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Means over folds of so many images in their order, each with its own captions as candidates:
    the "1k" figures of COCO, five folds of its 5,000 test images (Karpathy & Fei-Fei 2015, section
    4.1). A rest of fewer is left out. `measure`: what each fold is measured by. `relevance`: as
    `retrieval_report` takes it; within each fold.

    Raises:
        DataError: fewer images than one fold.
    """
    n_folds = len(image) // fold_images
    if n_folds < 1:
        raise DataError(
            f"{len(image)} images are fewer than one fold of {fold_images}; give a smaller --folds"
        )
    reports = []
    for fold in range(n_folds):
        first = fold * fold_images
        texts = torch.nonzero(
            (image_of_text >= first) & (image_of_text < first + fold_images)
        ).squeeze(1)
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
    """Report each language by itself: its captions alone, and the images that have one, as queries
    and candidates.

    Args:
        languages: of each caption. The reports are sorted by name.
        relevance: as `retrieval_report` takes it; captions of other languages make no answer right.
    """
    return {
        language: retrieval_report(*vectors, ks, right)
        for language, vectors, right in _by_language(
            image,
            text=text,
            image_of_text=image_of_text,
            languages=languages,
            relevance=relevance,
        )
    }


def language_intervals(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    languages: Sequence[str],
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> Mapping[str, Intervals]:
    """Compute the intervals of `language_reports`, of the same arguments."""
    return {
        language: retrieval_intervals(*vectors, ks, right)
        for language, vectors, right in _by_language(
            image,
            text=text,
            image_of_text=image_of_text,
            languages=languages,
            relevance=relevance,
        )
    }


def _by_language(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    languages: Sequence[str],
    relevance: Relevance | None,
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], Relevance | None]]:
    for language in sorted(set(languages)):
        mask = torch.tensor([other == language for other in languages], device=text.device)
        images, owners = torch.unique(image_of_text[mask], return_inverse=True)
        right = None if relevance is None else relevance.select(owners, images, mask)
        yield language, (image[images], text[mask], owners), right


def _mean(reports: Sequence[RetrievalReport]) -> RetrievalReport:
    def mean(name: str) -> dict[int, float]:
        tables = [getattr(report, name) for report in reports]
        return {k: sum(table[k] for table in tables) / len(tables) for k in tables[0]}

    return RetrievalReport(
        image_to_text=mean("image_to_text"),
        text_to_image=mean("text_to_image"),
        n_images=reports[0].n_images,
        n_texts=round(sum(report.n_texts for report in reports) / len(reports)),
        chance_image_to_text=mean("chance_image_to_text"),
        chance_text_to_image=mean("chance_text_to_image"),
    )
