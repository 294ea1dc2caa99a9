"""Report ranks as intervals over images, over published folds of 1,000 images, or by language."""

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
    ranks_of,
    report_of_ranks,
    retrieval_report,
)
from apecache.metrics.statistics import WAYS, Ends, RetrievalHits, Term, estimate_recall

Measure = Callable[[Tensor, Tensor, Tensor, Sequence[int], Relevance | None], RetrievalReport]
"""A function with the arguments of `retrieval_report`, by position."""


@dataclass(frozen=True, kw_only=True)
class RecallIntervals:
    """Hold 95 % intervals of recalls, in per cent, and the medians of the ranks."""

    image_to_text: dict[int, Ends]
    """The interval of the recall at each K."""
    text_to_image: dict[int, Ends]
    """The same in the other direction."""
    mean_recall: Ends
    """The interval of the mean of all recalls."""
    median_rank_image_to_text: float
    """1 is best."""
    median_rank_text_to_image: float


@dataclass(frozen=True, kw_only=True)
class RetrievalMeasurement:
    """Hold all that one ranking of a split says."""

    report: RetrievalReport
    intervals: RecallIntervals
    hits: RetrievalHits


def measure_retrieval(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalMeasurement:
    """Rank a split once, and return its recalls, their intervals and the hits of each image.

    The arguments are those of `retrieval_report`.
    """
    to_text, to_image = ranks_of(
        image,
        text=text,
        image_of_text=image_of_text,
        relevance=relevance,
    )
    report = report_of_ranks(
        to_text,
        to_image=to_image,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )
    image_ranks = to_text.cpu().numpy()
    text_ranks = to_image.cpu().numpy()
    hits = _hits_of_ranks(
        image_ranks,
        to_image=text_ranks,
        owner=image_of_text.cpu().numpy(),
        ks=ks,
    )
    intervals = _intervals_of_hits(hits, to_text=image_ranks, to_image=text_ranks, ks=ks)
    return RetrievalMeasurement(report=report, intervals=intervals, hits=hits)


def retrieval_hits(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalHits:
    """Collect the hits of each image and of its captions.

    The arguments are those of `retrieval_report`.
    """
    measured = measure_retrieval(
        image,
        text=text,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )
    return measured.hits


def retrieval_intervals(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RecallIntervals:
    """Compute the intervals of one run over images, each with its captions.

    Captions of one image are not independent, so the images are the sample. The method is that of
    `apecache.metrics.statistics`. The arguments are those of `retrieval_report`.
    """
    measured = measure_retrieval(
        image,
        text=text,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )
    return measured.intervals


def _intervals_of_hits(
    hits: RetrievalHits,
    to_text: NDArray[np.int64],
    to_image: NDArray[np.int64],
    ks: Sequence[int],
) -> RecallIntervals:
    def ends(*terms: Term) -> Ends:
        estimate = estimate_recall([hits], terms)
        return estimate.low, estimate.high

    return RecallIntervals(
        image_to_text={k: ends(("image_to_text", k)) for k in ks},
        text_to_image={k: ends(("text_to_image", k)) for k in ks},
        mean_recall=ends(*product(WAYS, ks)),
        # Ranks count from 0, reported medians from 1.
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
    image_hits = {}
    caption_hits = {}
    for k in ks:
        image_hits[k] = (to_text < k).astype(np.float64)
        # Hits of captions are summed by image: the image is the unit of the sample.
        hits_of_image = np.bincount(owner, weights=to_image < k, minlength=n_images)
        caption_hits[k] = hits_of_image.astype(np.float64)
    return RetrievalHits(
        image_to_text=image_hits,
        text_to_image=caption_hits,
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
    """Average reports over folds of images, each with its own captions as candidates.

    The "1k" figures of COCO are those of five folds of its 5,000 test images (Karpathy & Fei-Fei
    2015, section 4.1).

    Args:
        image: as `retrieval_report` takes it; so are `text`, `image_of_text` and `ks`.
        fold_images: images of a fold, in their order. A last fold of fewer images is left out.
        measure: computes the report of one fold.
        relevance: as `retrieval_report` takes it; it is restricted to each fold.

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
        in_fold = (image_of_text >= first) & (image_of_text < first + fold_images)
        texts = torch.nonzero(in_fold).squeeze(1)
        # Rows of images are counted from the begin of the fold.
        owners = image_of_text[texts] - first
        images = slice(first, first + fold_images)
        right = None if relevance is None else relevance.select(owners, images, texts)
        reports.append(measure(image[images], text[texts], owners, ks, right))
    return _mean(reports)


def measure_languages(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    languages: Sequence[str],
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> Mapping[str, RetrievalMeasurement]:
    """Measure each language by itself.

    Queries and candidates are its captions, and the images that have one.

    Args:
        image: as `retrieval_report` takes it; so are `text`, `image_of_text` and `ks`.
        languages: of each caption. The results are sorted by name.
        relevance: as `retrieval_report` takes it; captions of other languages make no answer right.
    """
    subsets = _by_language(
        image,
        text=text,
        image_of_text=image_of_text,
        languages=languages,
        relevance=relevance,
    )
    return {
        language: measure_retrieval(*vectors, ks, right) for language, vectors, right in subsets
    }


def _by_language(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    languages: Sequence[str],
    relevance: Relevance | None,
) -> Iterator[tuple[str, tuple[Tensor, Tensor, Tensor], Relevance | None]]:
    """Yield each language with its images, texts and image of each text, and right answers."""
    for language in sorted(set(languages)):
        mask = torch.tensor([other == language for other in languages], device=text.device)
        # `owners` counts among the images that have a caption in the language.
        images, owners = torch.unique(image_of_text[mask], return_inverse=True)
        right = None if relevance is None else relevance.select(owners, images, mask)
        vectors = (image[images], text[mask], owners)
        yield language, vectors, right


def _mean(reports: Sequence[RetrievalReport]) -> RetrievalReport:
    """Average reports of folds, which have equally many images."""

    def mean(name: str) -> dict[int, float]:
        tables = [getattr(report, name) for report in reports]
        means = {}
        for k in tables[0]:
            means[k] = sum(table[k] for table in tables) / len(tables)
        return means

    # Folds differ in their captions, so their number is a rounded mean.
    n_texts = round(sum(report.n_texts for report in reports) / len(reports))

    return RetrievalReport(
        image_to_text=mean("image_to_text"),
        text_to_image=mean("text_to_image"),
        n_images=reports[0].n_images,
        n_texts=n_texts,
        chance_image_to_text=mean("chance_image_to_text"),
        chance_text_to_image=mean("chance_text_to_image"),
    )
