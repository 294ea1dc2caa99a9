"""Losses that may do better than InfoNCE, in the form that `apecache.register_loss` takes.

Each builder takes a strength and returns a loss of (image, text, scale, groups). A strength of 0 is
InfoNCE, except for `negative_free`, which has no negatives at all. Without a remark images and texts
are [n, dim], L2-normalized, and row i of one belongs to row i of the other; pairs that the groups
call equal are left out of the negatives.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apecache.heads.normalization import normalize, similarities
from apecache.losses.contrastive import Groups, grouped_info_nce
from apecache.losses.registered import ComputeLoss
from apecache.metrics.csls import CSLS_NEIGHBORS

N_SLICES = 64
"""Random directions of `gaussian_distance` in a step."""
FREQUENCIES = torch.linspace(0.25, 4.0, 16)
"""Points at which characteristic functions are compared."""


def label_smoothing(share: float) -> ComputeLoss:
    """Spread `share` of the target evenly over all candidates (Szegedy et al. 2016, section 7)."""

    def compute(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        logits = scale * similarities(image, text)
        left_out = equal_pairs(groups)
        return both_ways(logits, left_out, share)

    return compute


def caption_pairs(weight: float) -> ComputeLoss:
    """Add InfoNCE between two captions of each image, of which a batch must hold two."""

    def compute(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        assert groups is not None
        across = grouped_info_nce(image, text=text, scale=scale, groups=groups)
        # The captions of one image stand one after another.
        of_captions = Groups(image=groups.image, text=groups.image)
        within = grouped_info_nce(text[0::2], text=text[1::2], scale=scale, groups=of_captions)
        return across + weight * within

    return compute


def centering(share: float) -> ComputeLoss:
    """Take `share` of the mean of the batch off each side, then L2-normalize again."""

    def compute(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        centered_image = normalize(image - share * image.mean(0))
        centered_text = normalize(text - share * text.mean(0))
        logits = scale * similarities(centered_image, centered_text)
        return both_ways(logits, equal_pairs(groups))

    return compute


def csls_training(share: float) -> ComputeLoss:
    """Compute InfoNCE of cosines less `share` of the hubness that CSLS takes off them.

    CSLS / 2 = cos(x, y) - (r(x) + r(y)) / 2, with the neighborhoods r of the batch (Joulin et al.
    2018, Loss in translation, train with CSLS too).
    """

    def compute(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        cosines = similarities(image, text)
        k = min(CSLS_NEIGHBORS, len(cosines))
        near_image = cosines.topk(k, dim=1).values.mean(1, keepdim=True)
        near_text = cosines.topk(k, dim=0).values.mean(0, keepdim=True)
        logits = scale * (cosines - share * (near_image + near_text) / 2)
        return both_ways(logits, equal_pairs(groups))

    return compute


def negative_free(weight: float) -> ComputeLoss:
    """Predict the other side's embedding, and keep each side spread as a Gaussian.

    (1 - weight) x squared distance of the pairs + weight x `gaussian_distance` of both sides, as
    LeVLJEPA (Kuhn et al. 2026) with SIGReg (Balestriero and LeCun 2025). The heads are the
    predictors, because a search compares their outputs; so targets get gradients too.
    """

    def compute(image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        # Scaled so that isotropic vectors have a variance of 1 in each direction.
        image = image * image.shape[1] ** 0.5
        text = text * text.shape[1] ** 0.5
        distance = (image - text).square().mean()
        spread = (gaussian_distance(image) + gaussian_distance(text)) / 2
        return (1 - weight) * distance + weight * spread

    return compute


def gaussian_distance(vectors: Tensor) -> Tensor:
    """Compute the Epps-Pulley statistic of random projections, the mean over directions.

    It is n times the integral of |characteristic function of the sample - that of N(0, 1)|^2,
    weighted by the density of N(0, 1) up to a constant. `vectors`: [n, dim].
    """
    directions = F.normalize(torch.randn(vectors.shape[1], N_SLICES), dim=0)
    projected = vectors @ directions
    angles = projected.unsqueeze(-1) * FREQUENCIES
    # Both functions at -t are the conjugates of those at t: half of the integral is enough.
    expected = torch.exp(-FREQUENCIES.square() / 2)
    real = angles.cos().mean(0) - expected
    imaginary = angles.sin().mean(0)
    distances = (real.square() + imaginary.square()) * expected
    step = FREQUENCIES[1] - FREQUENCIES[0]
    return len(vectors) * 2 * step * distances.sum(1).mean()


@dataclass(frozen=True, kw_only=True)
class MinedRows:
    """Hold what was mined among the n training images, once, with the heads of an earlier run."""

    hard_texts: Tensor
    """int64 [n, k], for each image the images with the nearest captions, nearest first."""
    hard_images: Tensor
    """int64 [n, k], for the captions of each image the nearest images."""
    allowed: Tensor
    """bool [n, n], which images may be each other's negatives."""


class MinedNegatives:
    """Compute InfoNCE with further negatives, mined among all training images.

    The embeddings of mined rows are those of the last batch that held them, without gradient.
    Groups must hold rows of the training pairs, see `losses.numbered_rows`.

    Args:
        mined: What was mined; pairs that are not allowed are left out within a batch too.
        n_hard: Mined negatives of each query.
    """

    def __init__(self, mined: MinedRows, n_hard: int) -> None:
        self.mined = mined
        self.n_hard = n_hard
        self.image = torch.empty(0)
        self.text = torch.empty(0)
        self.is_known = torch.zeros(len(mined.allowed), dtype=torch.bool)

    def __call__(self, image: Tensor, text: Tensor, scale: Tensor, groups: Groups | None) -> Tensor:
        assert groups is not None
        rows = groups.image
        left_out = ~self.mined.allowed[rows[:, None], rows]
        left_out.fill_diagonal_(False)
        logits = (scale * similarities(image, text)).masked_fill(left_out, -torch.inf)
        to_text = logits
        to_image = logits.T
        if self.n_hard and len(self.image):
            hard_texts = self.mined.hard_texts[rows, : self.n_hard]
            hard_images = self.mined.hard_images[rows, : self.n_hard]
            to_text = self._extended(to_text, image, self.text, hard_texts, rows, scale)
            to_image = self._extended(to_image, text, self.image, hard_images, rows, scale)
        self._remember(image, text, rows)
        targets = torch.arange(len(rows))
        return (F.cross_entropy(to_text, targets) + F.cross_entropy(to_image, targets)) / 2

    def _extended(
        self,
        logits: Tensor,
        queries: Tensor,
        bank: Tensor,
        hard: Tensor,
        rows: Tensor,
        scale: Tensor,
    ) -> Tensor:
        """Append the logits of mined rows, without those that are unknown or in the batch."""
        is_new = self.is_known.clone()
        is_new[rows] = False
        # Of few images there can be fewer allowed ones than are mined.
        usable = is_new[hard] & self.mined.allowed[rows.unsqueeze(1), hard]
        mined = scale * torch.bmm(bank[hard], queries.unsqueeze(2)).squeeze(2)
        return torch.cat((logits, mined.masked_fill(~usable, -torch.inf)), dim=1)

    def _remember(self, image: Tensor, text: Tensor, rows: Tensor) -> None:
        if not len(self.image):
            self.image = torch.zeros(len(self.is_known), image.shape[1])
            self.text = torch.zeros(len(self.is_known), text.shape[1])
        self.image[rows] = image.detach()
        self.text[rows] = text.detach()
        self.is_known[rows] = True


def mine_rows(image: Tensor, text: Tensor, captions: Tensor, least: float, count: int) -> MinedRows:
    """Mine the nearest wrong captions and images of each training image.

    Args:
        image: Embeddings [n, dim], L2-normalized.
        text: Of the mean of each image's captions, [n, dim].
        captions: The mean of each image's captions in the text encoder, [n, text_dim]: the mean of
            unit vectors, not normalized again, so that products are mean cosines of two captions.
        least: Mean cosine from which on two images are probably positives of each other.
        count: Rows that are kept for each query.
    """
    allowed = similarities(captions, captions) < least
    allowed.fill_diagonal_(False)
    cosines = similarities(image, text).masked_fill(~allowed, -torch.inf)
    return MinedRows(
        hard_texts=cosines.topk(count, dim=1).indices,
        hard_images=cosines.T.topk(count, dim=1).indices,
        allowed=allowed,
    )


def both_ways(logits: Tensor, left_out: Tensor | None, smoothing: float = 0.0) -> Tensor:
    """Compute the mean cross-entropy of rows and columns, whose targets lie on the diagonal.

    Args:
        logits: [n, n].
        left_out: bool [n, n], pairs that are no candidates; None: all are.
        smoothing: Share of the targets that is spread over all candidates.
    """
    kept = torch.ones_like(logits, dtype=torch.bool) if left_out is None else ~left_out
    losses = []
    for way, kept_way in ((logits, kept), (logits.T, kept.T)):
        log_shares = way.masked_fill(~kept_way, -torch.inf).log_softmax(1)
        loss = -log_shares.diagonal()
        if smoothing:
            spread = -log_shares.masked_fill(~kept_way, 0.0).sum(1) / kept_way.sum(1)
            loss = (1 - smoothing) * loss + smoothing * spread
        losses.append(loss.mean())
    return torch.stack(losses).mean()


def equal_pairs(groups: Groups | None) -> Tensor | None:
    """Return the pairs that belong together beside those of the diagonal; None if there are none."""
    if groups is None:
        return None
    same = groups.image.unsqueeze(1) == groups.text.unsqueeze(0)
    return same.fill_diagonal_(False)
