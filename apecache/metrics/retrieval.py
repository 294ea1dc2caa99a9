"""Measure image-text retrieval, exactly and in tiles, with several captions per image.

An image's query is a hit at K if *any* of its right captions is among the top K texts. Every
caption is a query of its own for images. An image's own captions are right, and with a `Relevance`
also all that equal them. A wrong candidate that scores as high as the right one counts as ranked
before it, so embeddings that have collapsed to one point score zero and not one hundred.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from apecache.arguments import require_type
from apecache.errors import DataError, counted
from apecache.heads.normalization import similarities
from apecache.metrics.relevance import Relevance

KS = (1, 5, 10)
TILE = 1024
"""Queries that are compared with all candidates at a time."""
TIE = 2.0**-20
"""Cosines closer than this are ties. It is several times the rounding error of a product of unit
vectors in float32 (2^-24 or more, depending on the order in which a processor sums), and far below
any difference that means something."""


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Hold the recall at each K, in per cent, in both directions."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    n_images: int
    """Images, as queries and as candidates."""
    n_texts: int
    """Captions, as queries and as candidates."""
    chance_image_to_text: dict[int, float]
    """Expected recall of a random order. Equal captions and images raise it."""
    chance_text_to_image: dict[int, float]
    map_at_r: float | None = None
    """Mean of both directions, in per cent, where few captions differ (`metrics.selection`). None:
    recalls can rank."""

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RetrievalReport":
        """Restore a report from the JSON of its `asdict`, whose keys are strings.

        Raises:
            KeyError, TypeError, ValueError: `value` is not such a report.
        """
        image_to_text = _recalls_from_json(value["image_to_text"])
        text_to_image = _recalls_from_json(value["text_to_image"])
        chance_image_to_text = _recalls_from_json(value["chance_image_to_text"])
        chance_text_to_image = _recalls_from_json(value["chance_text_to_image"])
        return RetrievalReport(
            image_to_text=image_to_text,
            text_to_image=text_to_image,
            n_images=int(value["n_images"]),
            n_texts=int(value["n_texts"]),
            chance_image_to_text=chance_image_to_text,
            chance_text_to_image=chance_text_to_image,
            map_at_r=value.get("map_at_r"),
        )

    @property
    def selection_score(self) -> float:
        """Return what chooses epochs and settings: mAP@R if there is one, else the mean recall."""
        return self.mean_recall if self.map_at_r is None else self.map_at_r

    @property
    def mean_recall(self) -> float:
        """Return the mean of all recalls."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    @property
    def mean_chance(self) -> float:
        """Return what `mean_recall` of a random order would be, in per cent."""
        values = [*self.chance_image_to_text.values(), *self.chance_text_to_image.values()]
        return sum(values) / len(values)

    @property
    def mean_recall_at_1(self) -> float:
        """Return DataComp's retrieval score: the mean of the two R@1."""
        return (self.image_to_text[1] + self.text_to_image[1]) / 2


def _recalls_from_json(recalls: Mapping[str, Any]) -> dict[int, float]:
    return {int(k): float(recall) for k, recall in recalls.items()}


def retrieval_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Compute the recall at each K in both directions.

    Args:
        image: [n_images, dim], L2-normalized.
        text: [n_texts, dim], L2-normalized, on the same device.
        image_of_text: int64 [n_texts], the row in `image` of each caption's image. Every image
            needs a caption.
        ks: values of K.
        relevance: the right answers where captions or images are equal. None: only an image's own
            captions are right.

    Raises:
        DataError: nothing to rank, an image without a caption, or embeddings that are not finite.
    """
    to_text, to_image = ranks_of(
        image,
        text=text,
        image_of_text=image_of_text,
        relevance=relevance,
    )
    return report_of_ranks(
        to_text,
        to_image=to_image,
        image_of_text=image_of_text,
        ks=ks,
        relevance=relevance,
    )


def ranks_of(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> tuple[Tensor, Tensor]:
    """Rank all queries of both directions; arguments and errors are those of `retrieval_report`.

    Returns:
        The ranks of images [n_images] and of texts [n_texts] as queries, int64; 0 is best.
    """
    for name, value in (("image", image), ("text", text), ("image_of_text", image_of_text)):
        require_type(value, Tensor, name)
    _require_rankable(image, text, image_of_text)
    to_text = image_to_text_ranks(
        image,
        text=text,
        image_of_text=image_of_text,
        relevance=relevance,
    )
    to_image = text_to_image_ranks(
        image,
        text=text,
        image_of_text=image_of_text,
        relevance=relevance,
    )
    return to_text, to_image


def report_of_ranks(
    to_text: Tensor,
    to_image: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Compute the recalls of the ranks that `ranks_of` returned for the same arguments."""
    n_images = len(to_text)
    chance_image_to_text, chance_text_to_image = chance_recalls(
        image_of_text,
        n_images=n_images,
        ks=ks,
        relevance=relevance,
    )
    return RetrievalReport(
        image_to_text=recall_at(to_text, ks),
        text_to_image=recall_at(to_image, ks),
        n_images=n_images,
        n_texts=len(to_image),
        chance_image_to_text=chance_image_to_text,
        chance_text_to_image=chance_text_to_image,
    )


def chance_recalls(
    image_of_text: Tensor,
    n_images: int,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> tuple[dict[int, float], dict[int, float]]:
    """Return the expected recalls of a random order in per cent: image to text, and text to image.

    Args:
        image_of_text: int64 [n_texts], the row of each caption's image.
        n_images: images that are ranked.
        relevance: as `retrieval_report` takes it.
    """
    n_texts = len(image_of_text)
    if relevance is None:
        right_texts = torch.bincount(image_of_text, minlength=n_images)
        # Every caption has one right image, so one entry has the mean of all.
        right_images = torch.ones(1, dtype=torch.int64)
    else:
        right_texts = relevance.n_right_texts()
        right_images = relevance.n_right_images()
    to_text = {k: mean_chance(n_texts, right_texts, k) for k in ks}
    to_image = {k: mean_chance(n_images, right_images, k) for k in ks}
    return to_text, to_image


def recall_at(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Compute the share of ranks (0 is best) below each K, in per cent."""
    return {k: 100 * float((ranks < k).double().mean()) for k in ks}


def image_to_text_ranks(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> Tensor:
    """Rank the best right text of each image; arguments as `retrieval_report` takes them.

    Returns:
        int64 [n_images], the wrong texts that score at least as high as the best right text.
    """
    tile_ranks = []
    for rows in _tiles(len(image), image.device):
        scores = similarities(image[rows], text)
        if relevance is None:
            right = _own_texts(image_of_text, rows)
        else:
            right = relevance.right_texts(rows)
        tile_ranks.append(_wrong_before(scores, right))
    return torch.cat(tile_ranks)


def text_to_image_ranks(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> Tensor:
    """Rank the best right image of each text; arguments as `retrieval_report` takes them.

    Returns:
        int64 [n_texts], the wrong images that score at least as high as the best right image.
    """
    tile_ranks = []
    for rows in _tiles(len(text), image.device):
        scores = similarities(text[rows], image)
        if relevance is None:
            own_score = scores.gather(1, image_of_text[rows].unsqueeze(1))
            # Less 1: the own image is at least as high as itself.
            tile_ranks.append((scores >= own_score - TIE).sum(1) - 1)
        else:
            tile_ranks.append(_wrong_before(scores, relevance.right_images(rows)))
    return torch.cat(tile_ranks)


def _own_texts(image_of_text: Tensor, images: Tensor) -> Tensor:
    """Return bool [len(images), n_texts]: the captions of each of these images (rows)."""
    return image_of_text.unsqueeze(0) == images.unsqueeze(1)


def _wrong_before(scores: Tensor, right: Tensor) -> Tensor:
    """Return int64 [rows]: the wrong candidates that score as high as the row's best right one."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    is_before = scores >= best - TIE
    return (is_before & ~right).sum(1)


def _tiles(count: int, device: torch.device) -> Iterator[Tensor]:
    """Yield rows in tiles of nearly equal size."""
    n_tiles = -(-count // TILE)
    yield from torch.arange(count, device=device).tensor_split(n_tiles)


def mean_chance(n_candidates: int, n_right: Tensor, k: int) -> float:
    """Compute the expected recall at K of a random order, in per cent.

    Args:
        n_candidates: candidates of each query.
        n_right: int64 [queries], the right candidates of each query.
        k: the K.
    """
    right_counts = n_right.tolist()
    # Few numbers differ, and a binomial coefficient of large numbers is slow.
    chances = {count: _chance(n_candidates, count, k) for count in set(right_counts)}
    return 100 * sum(chances[count] for count in right_counts) / len(right_counts)


def _chance(n_candidates: int, n_right: int, k: int) -> float:
    """Return the probability that a random top K has a right one: 1 - C(n - r, k) / C(n, k)."""
    # Fewer candidates than K: all of them are among the top K.
    if k >= n_candidates:
        return 1.0
    return 1 - comb(n_candidates - n_right, k) / comb(n_candidates, k)


def _require_rankable(image: Tensor, text: Tensor, image_of_text: Tensor) -> None:
    """Refuse embeddings that cannot be ranked, as `retrieval_report` says."""
    if not len(image) or not len(text):
        raise DataError(
            f"nothing to rank: {counted(len(image), 'image')} and {counted(len(text), 'text')}"
        )
    if int(torch.bincount(image_of_text, minlength=len(image)).min()) == 0:
        raise DataError("an image without a caption cannot be a query: leave it out")
    # No comparison with NaN is true, so NaN would rank as if nothing scored higher.
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise DataError("embeddings that are not finite cannot be ranked")
