"""The contrastive losses for batches whose logits do not fit: exact, in memory O(tile x batch).

Logits are made tile by tile (some images x all texts) and made again where they are needed, instead
of being kept for the backward pass; losses and gradients are those of `contrastive` up to rounding.
A whole data set can be one batch.
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
    """`info_nce`, or with groups `grouped_info_nce`, without keeping the logits. Gradients of the
    first order only."""
    image = at_least_float32(image)
    text = at_least_float32(text)
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
    """`sigmoid_loss` without keeping the logits. Gradients of the first order only."""
    image = at_least_float32(image)
    text = at_least_float32(text)
    scale, bias = (torch.as_tensor(value, dtype=image.dtype) for value in (scale, bias))
    with without_autocast(image):
        loss: Tensor = _Sigmoid.apply(image, text, scale, bias, groups, tile)
    return loss


class _InfoNce(torch.autograd.Function):
    """With N_i the log of the sum over row i's negatives, pair (i, j) costs softplus(N_i - s_ij);
    so its own logit gets the gradient -w sigmoid(N_i - s_ij), and each negative k of the row
    exp(s_ik - N_i) times what the pairs lost."""

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
        own = scale * _row_dots(image, text=text, rows=rows, columns=columns, tile=tile)
        to_text, to_image = _negatives(image, text=text, scale=scale, groups=groups, tile=tile)
        margins = to_text[rows] - own, to_image[columns] - own
        weights = share_of(rows, len(image), own.dtype), share_of(columns, len(text), own.dtype)
        ctx.save_for_backward(
            image,
            text,
            scale,
            rows,
            columns,
            to_text,
            to_image,
            *margins,
            *weights,
        )
        ctx.groups = groups
        ctx.tile = tile
        return (
            torch.stack(
                [(w * softplus(m)).sum() for w, m in zip(weights, margins, strict=True)]
            ).sum()
            / 2
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, rows, columns, to_text, to_image, *rest = ctx.saved_tensors
        lost = [w * torch.sigmoid(m) / 2 for m, w in zip(rest[:2], rest[2:], strict=True)]
        by_row = torch.zeros_like(to_text).index_add_(0, rows, lost[0])
        by_column = torch.zeros_like(to_image).index_add_(0, columns, lost[1])
        # factor x exp(s - N) as exp(s - (N - log factor)): one pass less over every tile
        row_shift = to_text - by_row.log()
        column_shift = to_image - by_column.log()
        grad_image = torch.empty_like(image)
        grad_text = torch.zeros_like(text)
        for part, logits, same in _tiles(
            image,
            text=text,
            scale=scale,
            groups=ctx.groups,
            tile=ctx.tile,
        ):
            towards = (logits - row_shift[part].unsqueeze(1)).exp_()
            towards += (logits - column_shift).exp_()
            _clear(towards, same)
            torch.mm(towards, text, out=grad_image[part])
            grad_text.addmm_(towards.T, image[part])
        _pull_together(
            grad_image,
            grad_text=grad_text,
            image=image,
            text=text,
            pairs=(rows, columns),
            pull=lost[0] + lost[1],
            tile=ctx.tile,
        )
        grad_scale = (grad_image * image).sum() if ctx.needs_input_grad[2] else None
        return _scaled(grad, scale=scale, image=grad_image, text=grad_text, grad_scale=grad_scale)


class _Sigmoid(torch.autograd.Function):
    """Pairs do not depend on one another, so the gradients are made in the one pass that makes the
    loss."""

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
        own = scale * _row_dots(image, text=text, rows=rows, columns=columns, tile=tile) + bias
        pull = torch.sigmoid(-own)
        total = softplus(-own).sum()
        grad_bias = -pull.sum()
        grad_image = torch.empty_like(image)
        grad_text = torch.zeros_like(text)
        for part, logits, same in _tiles(image, text=text, scale=scale, groups=groups, tile=tile):
            logits += bias
            _clear(logits, same, -torch.inf)
            total += softplus(logits).sum()
            logits.sigmoid_()
            grad_bias += logits.sum()
            torch.mm(logits, text, out=grad_image[part])
            grad_text.addmm_(logits.T, image[part])
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
        first = _scaled(
            grad,
            scale=scale,
            image=grad_image,
            text=grad_text,
            grad_scale=(grad_image * image).sum(),
        )
        return (*first[:3], grad * grad_bias, None, None)


def _pull_together(
    grad_image: Tensor,
    grad_text: Tensor,
    image: Tensor,
    text: Tensor,
    pairs: tuple[Tensor, Tensor],
    pull: Tensor,
    tile: int,
) -> None:
    """Add the gradients -pull [p] of the positive pairs' cosines, in place."""
    for part in _ranges(len(pull), tile):
        i = pairs[0][part]
        j = pairs[1][part]
        force = -pull[part].unsqueeze(1)
        grad_image.index_add_(0, i, force * text[j])
        grad_text.index_add_(0, j, force * image[i])


def _scaled(
    grad: Tensor,
    scale: Tensor,
    image: Tensor,
    text: Tensor,
    grad_scale: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """From gradients by the cosines to those by the inputs. The sum of gradient x cosine over all
    pairs, which is the gradient by the scale, is the sum of gradient x image: no further look at
    the logits."""
    factor = grad * scale
    return (
        factor * image,
        factor * text,
        None if grad_scale is None else grad * grad_scale,
        None,
        None,
    )


def _tiles(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    groups: Groups | None,
    tile: int,
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """(rows, logits of these images with all texts, mask of the positives or None where they are
    the diagonal's)."""
    for part in _ranges(len(image), tile):
        logits = torch.mm(image[part] * scale, text.T)
        if groups is None:
            same = torch.arange(part.start, part.stop, device=image.device).unsqueeze(1)
        else:
            same = groups.image[part].unsqueeze(1) == groups.text.unsqueeze(0)
        yield part, logits, same


def _clear(logits: Tensor, same: Tensor | None, value: float = 0.0) -> None:
    """Give the positives of a tile this value, in place."""
    if same is not None and same.dtype == torch.bool:
        logits.masked_fill_(same, value)
    elif same is not None:
        logits.scatter_(1, same, value)


def _negatives(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    groups: Groups | None,
    tile: int,
) -> tuple[Tensor, Tensor]:
    """log sum exp over the negatives of each image [n] and each text [m]; the lowest number where
    there are none."""
    floor = torch.finfo(image.dtype).min
    to_text = image.new_empty(len(image))
    to_image = image.new_full((len(text),), -torch.inf)
    for part, logits, same in _tiles(image, text=text, scale=scale, groups=groups, tile=tile):
        _clear(logits, same, -torch.inf)
        torch.logsumexp(logits, 1, out=to_text[part])
        to_image = torch.logaddexp(to_image, logits.logsumexp(0))
    return to_text.clamp_min_(floor), to_image.clamp_min(floor)


def _positives(image: Tensor, groups: Groups | None) -> tuple[Tensor, Tensor]:
    if groups is not None:
        return groups.positives()
    rows = torch.arange(len(image), device=image.device)
    return rows, rows


def _row_dots(image: Tensor, text: Tensor, rows: Tensor, columns: Tensor, tile: int) -> Tensor:
    parts = [(image[rows[part]] * text[columns[part]]).sum(1) for part in _ranges(len(rows), tile)]
    return torch.cat(parts)


def _ranges(count: int, size: int) -> Iterator[slice]:
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))
