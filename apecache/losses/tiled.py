"""Compute contrastive losses of batches whose logits do not fit: exact, in memory O(tile x batch).

Logits are computed tile by tile (some images x all texts). The backward pass computes them again
instead of storing them. Losses and gradients are those of `contrastive` up to rounding. A whole
data set can be one batch.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from apecache.heads.normalization import at_least_float32, without_autocast
from apecache.losses.contrastive import Groups, share_of, softplus

TILE = 256
"""Images per tile; a tile of logits is small enough for the caches of a processor at usual batch
sizes."""


def tiled_info_nce(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    groups: Groups | None = None,
    tile: int = TILE,
) -> Tensor:
    """Compute `info_nce`, or with groups `grouped_info_nce`, without storing the logits.

    It has gradients of the first order only. `tile`: images of a tile.
    """
    image = at_least_float32(image)
    text = at_least_float32(text)
    # Autograd functions take positional arguments only.
    with without_autocast(image):
        loss: Tensor = _InfoNce.apply(
            image,
            text,
            torch.as_tensor(scale, dtype=image.dtype),
            groups,
            tile,
        )
    return loss


def tiled_sigmoid_loss(
    image: Tensor,
    text: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    groups: Groups | None = None,
    tile: int = TILE,
) -> Tensor:
    """Compute `sigmoid_loss` without storing the logits.

    It has gradients of the first order only. `tile`: images of a tile.
    """
    image = at_least_float32(image)
    text = at_least_float32(text)
    with without_autocast(image):
        loss: Tensor = _Sigmoid.apply(
            image,
            text,
            torch.as_tensor(scale, dtype=image.dtype),
            torch.as_tensor(bias, dtype=image.dtype),
            groups,
            tile,
        )
    return loss


class _InfoNce(torch.autograd.Function):
    """Compute InfoNCE both ways.

    With N_i the log of the sum over row i's negatives, pair (i, j) of weight w costs
    w softplus(N_i - s_ij). Its logit s_ij gets the gradient -w sigmoid(N_i - s_ij). Each negative k
    of the row gets exp(s_ik - N_i) times the sum of w sigmoid(N_i - s_ij) over the row's pairs.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        groups: Groups | None,
        tile: int,
    ) -> Tensor:
        rows, columns = _positives(image, groups)
        positive_logits = scale * _row_dots(image, text=text, rows=rows, columns=columns, tile=tile)
        to_text, to_image = _negatives(image, text=text, scale=scale, groups=groups, tile=tile)
        text_margins = to_text[rows] - positive_logits
        image_margins = to_image[columns] - positive_logits
        text_weights = share_of(rows, len(image), positive_logits.dtype)
        image_weights = share_of(columns, len(text), positive_logits.dtype)
        # O(n x dim) numbers and no logits; the backward pass computes those again.
        saved = (
            image,
            text,
            scale,
            rows,
            columns,
            to_text,
            to_image,
            text_margins,
            image_margins,
            text_weights,
            image_weights,
        )
        ctx.save_for_backward(*saved)
        ctx.groups = groups
        ctx.tile = tile
        text_loss = (text_weights * softplus(text_margins)).sum()
        image_loss = (image_weights * softplus(image_margins)).sum()
        return torch.stack([text_loss, image_loss]).sum() / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, rows, columns, to_text, to_image, *pair_terms = ctx.saved_tensors
        text_margins, image_margins, text_weights, image_weights = pair_terms
        text_pull = text_weights * torch.sigmoid(text_margins) / 2
        image_pull = image_weights * torch.sigmoid(image_margins) / 2
        by_row = torch.zeros_like(to_text).index_add_(0, rows, text_pull)
        by_column = torch.zeros_like(to_image).index_add_(0, columns, image_pull)
        # factor x exp(s - N) as exp(s - (N - log factor)): one pass less over every tile
        row_shift = to_text - by_row.log()
        column_shift = to_image - by_column.log()
        grad_image = torch.empty_like(image)
        grad_text = torch.zeros_like(text)
        for tile_rows, logits, same in _tiles(
            image,
            text=text,
            scale=scale,
            groups=ctx.groups,
            tile=ctx.tile,
        ):
            towards = (logits - row_shift[tile_rows].unsqueeze(1)).exp_()
            towards += (logits - column_shift).exp_()
            # Positives are no negatives of their own row or column.
            _clear(towards, same)
            torch.mm(towards, text, out=grad_image[tile_rows])
            grad_text.addmm_(towards.T, image[tile_rows])
        _pull_together(
            grad_image,
            grad_text=grad_text,
            image=image,
            text=text,
            pairs=(rows, columns),
            pull=text_pull + image_pull,
            tile=ctx.tile,
        )
        # A fixed temperature needs no gradient.
        grad_scale = (grad_image * image).sum() if ctx.needs_input_grad[2] else None
        return _scaled(grad, scale=scale, image=grad_image, text=grad_text, grad_scale=grad_scale)


class _Sigmoid(torch.autograd.Function):
    """Compute the sigmoid loss.

    Pairs do not depend on one another, so one pass over the logits computes loss and gradients.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        groups: Groups | None,
        tile: int,
    ) -> Tensor:
        rows, columns = _positives(image, groups)
        positive_logits = (
            scale * _row_dots(image, text=text, rows=rows, columns=columns, tile=tile) + bias
        )
        pull = torch.sigmoid(-positive_logits)
        total = softplus(-positive_logits).sum()
        grad_bias = -pull.sum()
        grad_image = torch.empty_like(image)
        grad_text = torch.zeros_like(text)
        for tile_rows, logits, same in _tiles(
            image,
            text=text,
            scale=scale,
            groups=groups,
            tile=tile,
        ):
            logits += bias
            # softplus(-inf) and sigmoid(-inf) are 0, so the sums are over negatives alone.
            _clear(logits, same, -torch.inf)
            total += softplus(logits).sum()
            # In place: a second tensor of a tile's size would double the memory.
            logits.sigmoid_()
            grad_bias += logits.sum()
            torch.mm(logits, text, out=grad_image[tile_rows])
            grad_text.addmm_(logits.T, image[tile_rows])
        _pull_together(
            grad_image,
            grad_text=grad_text,
            image=image,
            text=text,
            pairs=(rows, columns),
            pull=pull,
            tile=tile,
        )
        ctx.save_for_backward(image, scale, grad_image, grad_text, grad_bias)
        return total / len(text)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, scale, grad_image, grad_text, grad_bias = ctx.saved_tensors
        grad = grad / len(grad_text)
        to_image, to_text, to_scale, *_ = _scaled(
            grad,
            scale=scale,
            image=grad_image,
            text=grad_text,
            grad_scale=(grad_image * image).sum(),
        )
        return to_image, to_text, to_scale, grad * grad_bias, None, None


def _pull_together(
    grad_image: Tensor,
    grad_text: Tensor,
    image: Tensor,
    text: Tensor,
    pairs: tuple[Tensor, Tensor],
    pull: Tensor,
    tile: int,
) -> None:
    """Add the gradients -pull [p] of the positive pairs' logits, in place."""
    for block in _ranges(len(pull), tile):
        i = pairs[0][block]
        j = pairs[1][block]
        force = -pull[block].unsqueeze(1)
        grad_image.index_add_(0, i, force * text[j])
        grad_text.index_add_(0, j, force * image[i])


def _scaled(
    grad: Tensor,
    scale: Tensor,
    image: Tensor,
    text: Tensor,
    grad_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Turn gradients with respect to scaled images and texts into those of all five inputs.

    Args:
        grad: gradient of the loss.
        scale: factor of the cosines.
        image: [n, dim], gradients of the logits times texts, summed over texts.
        text: [m, dim], gradients of the logits times images, summed over images.
        grad_scale: sum of gradient x cosine over all pairs. It equals the sum of `image` times the
            images, so the logits are not needed again. None: no gradient is needed.
    """
    factor = grad * scale
    to_scale = None if grad_scale is None else grad * grad_scale
    return factor * image, factor * text, to_scale, None, None


def _tiles(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    groups: Groups | None,
    tile: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield tiles of logits: some images with all texts.

    Yields:
        The rows of the images, their logits [rows, m], and the positives among them: a bool mask of
        that shape, or without groups their columns, int64 [rows, 1].
    """
    for tile_rows in _ranges(len(image), tile):
        logits = torch.mm(image[tile_rows] * scale, text.T)
        # Without groups every row has one positive, so its column does for a mask.
        if groups is None:
            same = torch.arange(tile_rows.start, tile_rows.stop, device=image.device).unsqueeze(1)
        else:
            same = groups.image[tile_rows].unsqueeze(1) == groups.text.unsqueeze(0)
        yield tile_rows, logits, same


def _clear(logits: Tensor, same: Tensor, value: float = 0.0) -> None:
    """Set the positives of a tile to `value`, in place."""
    if same.dtype == torch.bool:
        logits.masked_fill_(same, value)
    else:
        logits.scatter_(1, same, value)


def _negatives(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    groups: Groups | None,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """Compute log sum exp over the negatives of each image [n] and each text [m].

    Without negatives it is the lowest finite number.
    """
    floor = torch.finfo(image.dtype).min
    to_text = image.new_empty(len(image))
    to_image = image.new_full((len(text),), -torch.inf)
    for tile_rows, logits, same in _tiles(image, text=text, scale=scale, groups=groups, tile=tile):
        _clear(logits, same, -torch.inf)
        torch.logsumexp(logits, 1, out=to_text[tile_rows])
        to_image = torch.logaddexp(to_image, logits.logsumexp(0))
    return to_text.clamp_min_(floor), to_image.clamp_min(floor)


def _positives(image: Tensor, groups: Groups | None) -> tuple[Tensor, Tensor]:
    """Return the rows of images and texts of all positive pairs, int64 [p] each."""
    if groups is not None:
        return groups.positives()
    rows = torch.arange(len(image), device=image.device)
    return rows, rows


def _row_dots(image: Tensor, text: Tensor, rows: Tensor, columns: Tensor, tile: int) -> Tensor:
    """Return [p]: the inner products of the pairs (rows[i], columns[i])."""
    block_dots = []
    for block in _ranges(len(rows), tile):
        products = image[rows[block]] * text[columns[block]]
        block_dots.append(products.sum(1))
    return torch.cat(block_dots)


def _ranges(count: int, size: int) -> Iterator[slice]:
    """Yield slices of up to `size` that cover `count` rows."""
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))
