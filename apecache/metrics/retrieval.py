"""Image-text retrieval, exact and in tiles, with several captions per image.

An image's query is a hit at K if *any* of its right captions is among the top K texts; every
caption is a query of its own for images. Right are an image's own captions, and with a `Relevance`
all that equal them. A wrong candidate that scores as high as the right one counts as ranked before
it, so embeddings that have collapsed to one point score zero and not one hundred.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import torch
from torch import Tensor

from apecache.arguments import require_type
from apecache.errors import DataError
from apecache.heads.normalization import similarities
from apecache.metrics.relevance import Relevance

KS = (1, 5, 10)
TILE = 1024
TIE = 2.0**-20
"""Cosines closer than this are ties: some times the rounding error of a product of unit vectors in
float32 (2^-24 and more, by how the processor's kernel orders its sums), far below any difference
that means something."""


@dataclass(frozen=True, kw_only=True)
class RetrievalReport:
    """Recall at K in per cent, both ways. `n_images` and `n_texts` are queries and candidates
    alike; chance is the expected recall of a random order: equal captions and images raise it."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    n_images: int
    n_texts: int
    chance_image_to_text: dict[int, float]
    chance_text_to_image: dict[int, float]

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> "RetrievalReport":
        """What `asdict` made of it, after JSON, whose keys are strings. Raises KeyError, TypeError
        or ValueError."""
        tables = {
            name: {int(k): float(recall) for k, recall in value[name].items()}
            for name in (
                "image_to_text",
                "text_to_image",
                "chance_image_to_text",
                "chance_text_to_image",
            )
        }
        return RetrievalReport(
            n_images=int(value["n_images"]),
            n_texts=int(value["n_texts"]),
            **tables,
        )

    @property
    def mean_recall(self) -> float:
        """Mean of all recalls, both ways: what epochs and recipes are chosen by."""
        values = [*self.image_to_text.values(), *self.text_to_image.values()]
        return sum(values) / len(values)

    @property
    def mean_chance(self) -> float:
        """Return what `mean_recall` of a random order would be, in per cent."""
        values = [*self.chance_image_to_text.values(), *self.chance_text_to_image.values()]
        return sum(values) / len(values)

    @property
    def mean_recall_at_1(self) -> float:
        """DataComp's retrieval score: the mean of the two R@1."""
        return (self.image_to_text[1] + self.text_to_image[1]) / 2


def retrieval_report(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = KS,
    relevance: Relevance | None = None,
) -> RetrievalReport:
    """Recall at each K.

    Args:
        image: [n_images, dim]; text: [n_texts, dim], both L2-normalised, on one device.
        image_of_text: int64 [n_texts], the row in `image` of each caption's image. Every image
            needs a caption.
        relevance: the right answers where captions or images are equal. None: only an image's own
            captions are right.

    Raises:
        DataError: nothing to rank, an image without a caption, or embeddings that are not finite.
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
    chance_image_to_text, chance_text_to_image = chance_recalls(
        image_of_text,
        n_images=len(image),
        ks=ks,
        relevance=relevance,
    )
    return RetrievalReport(
        image_to_text=recall_at(to_text, ks),
        text_to_image=recall_at(to_image, ks),
        n_images=len(image),
        n_texts=len(text),
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
        right_images = torch.ones(1, dtype=torch.int64)
    else:
        right_texts = relevance.n_right_texts()
        right_images = relevance.n_right_images()
    to_text = {k: mean_chance(n_texts, right_texts, k) for k in ks}
    to_image = {k: mean_chance(n_images, right_images, k) for k in ks}
    return to_text, to_image


def recall_at(ranks: Tensor, ks: Sequence[int]) -> dict[int, float]:
    """Share of ranks (0 is first) below each K, in per cent."""
    return {k: 100 * float((ranks < k).double().mean()) for k in ks}


def image_to_text_ranks(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> Tensor:
    """int64 [n_images]: how many wrong texts score at least as high as the image's best right
    one."""
    parts = []
    for rows in _tiles(len(image), image.device):
        scores = similarities(image[rows], text)
        right = (
            _own_texts(image_of_text, rows) if relevance is None else relevance.right_texts(rows)
        )
        parts.append(_wrong_before(scores, right))
    return torch.cat(parts)


def text_to_image_ranks(
    image: Tensor,
    text: Tensor,
    image_of_text: Tensor,
    relevance: Relevance | None = None,
) -> Tensor:
    """int64 [n_texts]: how many wrong images score at least as high as the caption's best right
    one."""
    parts = []
    for rows in _tiles(len(text), image.device):
        scores = similarities(text[rows], image)
        if relevance is None:
            own = scores.gather(1, image_of_text[rows].unsqueeze(1))
            parts.append((scores >= own - TIE).sum(1) - 1)
        else:
            parts.append(_wrong_before(scores, relevance.right_images(rows)))
    return torch.cat(parts)


def _own_texts(image_of_text: Tensor, images: Tensor) -> Tensor:
    """bool [len(images), n_texts]: the captions of each of these images (rows)."""
    return image_of_text.unsqueeze(0) == images.unsqueeze(1)


def _wrong_before(scores: Tensor, right: Tensor) -> Tensor:
    """int64 [rows]: wrong candidates of each row that score at least as high as its best right
    one."""
    best = scores.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    return ((scores >= best - TIE) & ~right).sum(1)


def _tiles(count: int, device: torch.device) -> Iterator[Tensor]:
    """Rows in tiles of about equal size."""
    yield from torch.arange(count, device=device).tensor_split(-(-count // TILE))


def mean_chance(n_candidates: int, n_right: Tensor, k: int) -> float:
    """Mean over queries with so many right candidates each, int64 [queries], in per cent."""
    counts = n_right.tolist()
    chances = {count: _chance(n_candidates, count, k) for count in set(counts)}
    return 100 * sum(chances[count] for count in counts) / len(counts)


def _chance(n_candidates: int, n_right: int, k: int) -> float:
    """Probability that a random top K holds one of the right ones: 1 - C(n - r, k) / C(n, k)."""
    if k >= n_candidates:
        return 1.0
    return 1 - comb(n_candidates - n_right, k) / comb(n_candidates, k)


def _require_rankable(image: Tensor, text: Tensor, image_of_text: Tensor) -> None:
    if not len(image) or not len(text):
        raise DataError(f"nothing to rank: {len(image)} images and {len(text)} texts")
    if int(torch.bincount(image_of_text, minlength=len(image)).min()) == 0:
        raise DataError("an image without a caption cannot be a query: leave it out")
    if not (torch.isfinite(image).all() and torch.isfinite(text).all()):
        raise DataError("embeddings that are not finite cannot be ranked")
