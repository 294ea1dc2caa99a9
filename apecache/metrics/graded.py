"""Measure retrieval with several right answers per query, which may have grades.

A query is ranked by cosine. A wrong candidate that scores as high as a right one ranks before it,
as in `apecache.metrics.retrieval`; among right ones the lower grade ranks first.

With R the number of right candidates of a query:
mAP@R is the mean over queries of 1/R x the sum, over the ranks i up to R that hold a right
candidate, of the precision at i (Musgrave et al. 2020, A metric learning reality check, section
3.2). R-precision is the share of right candidates among the first R. nDCG divides the sum of
grade / log2(1 + rank) by that of the best order (Järvelin & Kekäläinen 2002, with linear gain).
Queries without a right candidate are left out and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apecache.heads.normalization import similarities
from apecache.metrics.relevance import Relevance
from apecache.metrics.retrieval import KS, TIE

GRADED_TILE = 256
"""Queries that are sorted at a time: a row has all candidates."""


@dataclass(frozen=True, kw_only=True)
class GradedPairs:
    """Hold the pairs of images and texts that belong together, each with a grade above 0."""

    texts: Tensor
    """int64 [n_pairs], rows of the texts."""
    images: Tensor
    """int64 [n_pairs], rows of the images."""
    grades: Tensor
    """float32 [n_pairs]."""

    def to(self, device: torch.device) -> "GradedPairs":
        """Copy the pairs to another device."""
        return GradedPairs(
            texts=self.texts.to(device),
            images=self.images.to(device),
            grades=self.grades.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class GradedDirection:
    """Hold the figures of one direction, in per cent."""

    recall: dict[int, float]
    """Share of queries with a right candidate among the first K."""
    map_at_r: float
    r_precision: float
    ndcg: float
    n_queries: int
    """Queries with a right candidate."""
    mean_right: float
    """Right candidates of a query."""


@dataclass(frozen=True, kw_only=True)
class GradedReport:
    """Hold the figures of both directions."""

    image_to_text: GradedDirection
    text_to_image: GradedDirection


def graded_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    pairs: GradedPairs,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> GradedReport:
    """Measure both directions.

    Pairs of a caption with its own image, and with those that `relevance` adds, are right too.
    They have the highest grade of `pairs` unless they are listed there.

    Args:
        image: [n_images, dim], L2-normalized.
        text: [n_texts, dim], L2-normalized, on the same device.
        image_of_text: int64 [n_texts], the row of each caption's image.
        pairs: further pairs.
        ks: values of K.
        relevance: right answers where captions or images are equal.
    """
    pairs = pairs.to(image.device)
    # What is not listed is right for certain, so it gets the best grade.
    top_grade = float(pairs.grades.max()) if len(pairs.grades) else 1.0

    def text_grades(images: Tensor) -> Tensor:
        if relevance is None:
            own_pairs = image_of_text.unsqueeze(0) == images.unsqueeze(1)
        else:
            own_pairs = relevance.right_texts(images)
        return _listed(own_pairs * top_grade, images, pairs.images, pairs.texts, pairs.grades)

    def image_grades(texts: Tensor) -> Tensor:
        if relevance is None:
            columns = torch.arange(len(image), device=image.device)
            own_pairs = image_of_text[texts].unsqueeze(1) == columns.unsqueeze(0)
        else:
            own_pairs = relevance.right_images(texts)
        return _listed(own_pairs * top_grade, texts, pairs.texts, pairs.images, pairs.grades)

    return GradedReport(
        image_to_text=_direction(image, text, text_grades, ks),
        text_to_image=_direction(text, image, image_grades, ks),
    )


def _listed(
    grades: Tensor,
    queries: Tensor,
    of_query: Tensor,
    of_candidate: Tensor,
    listed: Tensor,
) -> Tensor:
    """Write the listed grades of a tile's queries over those of their own pairs."""
    is_here = torch.isin(of_query, queries)
    # The queries of a tile are consecutive rows.
    rows = of_query[is_here] - queries[0]
    grades[rows, of_candidate[is_here]] = listed[is_here]
    return grades


def _direction(
    queries: Tensor,
    candidates: Tensor,
    grades_of: Callable[[Tensor], Tensor],
    ks: Sequence[int],
) -> GradedDirection:
    """Rank the candidates of all queries, tile by tile."""
    tiles: list[dict[str, Tensor]] = []
    for first in range(0, len(queries), GRADED_TILE):
        rows = torch.arange(first, min(first + GRADED_TILE, len(queries)), device=queries.device)
        scores = similarities(queries[rows], candidates).double()
        tiles.append(_figures(scores, grades_of(rows).double(), ks))
    joined = {name: torch.cat([tile[name] for tile in tiles]) for name in tiles[0]}
    is_query = joined["n_right"] > 0
    n_queries = int(is_query.sum())

    def mean(name: str) -> float:
        return 100 * float(joined[name][is_query].mean()) if n_queries else 0.0

    return GradedDirection(
        recall={k: mean(f"hit@{k}") for k in ks},
        map_at_r=mean("map_at_r"),
        r_precision=mean("r_precision"),
        ndcg=mean("ndcg"),
        n_queries=n_queries,
        mean_right=mean("n_right") / 100,
    )


def _figures(scores: Tensor, grades: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Return the figures of each query of a tile, float64 [n_queries]."""
    is_right = grades > 0
    # A tie goes to the wrong candidate, and among right ones to the lower grade.
    top = grades.amax().clamp_min(1)
    handicap = torch.where(is_right, TIE * (1 + grades / top), 0.0)
    order = (scores - handicap).argsort(dim=1, descending=True)
    ranked = grades.gather(1, order)
    hits = (ranked > 0).double()
    n_right = hits.sum(1)
    safe_right = n_right.clamp_min(1)
    positions = torch.arange(1, scores.shape[1] + 1, device=scores.device, dtype=torch.float64)
    within_r = (positions.unsqueeze(0) <= n_right.unsqueeze(1)).double()
    precision = hits.cumsum(1) / positions
    discount = 1 / (1 + positions).log2()
    # The order that a perfect model gives has the highest gain.
    best = grades.sort(dim=1, descending=True).values
    best_gain = (best * discount).sum(1)
    figures = {
        "n_right": n_right,
        "map_at_r": (precision * hits * within_r).sum(1) / safe_right,
        "r_precision": (hits * within_r).sum(1) / safe_right,
        "ndcg": (ranked * discount).sum(1) / torch.where(best_gain > 0, best_gain, 1.0),
    }
    for k in ks:
        figures[f"hit@{k}"] = hits[:, :k].amax(1)
    return figures
