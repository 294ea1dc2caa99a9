"""Losses of several models at once, each with its own batch, and gradients in closed form."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

from apecache.losses.geometry import Divergence, structure_divergence

SAFE_SCALE = 40.0
"""Up to this scale the exponentials of the logits, and their sums, stay within float32, so that one
exponential serves both softmaxes."""
Gradients = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def batched_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
    """Do what `stacked_info_nce` does with the logits of all models at once, in few launches."""
    n_rows = image.shape[1]
    logits = torch.bmm(image * scale.view(-1, 1, 1), text.mT)
    by_rows = torch.log_softmax(logits, dim=2)
    by_columns = torch.log_softmax(logits, dim=1)
    diagonals = by_rows.diagonal(dim1=1, dim2=2) + by_columns.diagonal(dim1=1, dim2=2)
    losses = diagonals.sum(1).div_(-2 * n_rows)
    softmaxes = by_rows.exp_().add_(by_columns.exp_())
    factor = (scale / (2 * n_rows)).view(-1, 1, 1)
    # beta=-2 takes the 2 of the diagonal off without a change of the softmaxes.
    by_image = torch.baddbmm(text, softmaxes, text, beta=-2).mul_(factor)
    by_text = torch.baddbmm(image, softmaxes.mT, image, beta=-2).mul_(factor)
    return losses, (by_image, by_text, (by_image * image).sum((1, 2)))


@torch.no_grad()
def stacked_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
    """Compute `info_nce` of each model and its gradients.

    The gradient of a logit is (softmax of its row + softmax of its column - 2 on the diagonal),
    divided by 2n.

    Args:
        image: Embeddings, float [k, n, dim], L2-normalized.
        text: Embeddings, float [k, n, dim], L2-normalized.
        scale: The factor of the cosines, float [k].

    Returns:
        Losses, float [k], and their gradients by image, text and the logarithm of the scale.
    """
    by_images = torch.empty_like(image)
    by_texts = torch.empty_like(text)
    by_scales = torch.empty_like(scale)
    losses = torch.empty_like(scale)
    # Model by model: one model's logits [n, n] are in memory at a time, and stay in the caches.
    for i in range(len(scale)):
        model_image = image[i]
        model_text = text[i]
        scaled = model_image * scale[i]
        diagonal = (scaled * model_text).sum()
        log_sums, softmaxes = _softmaxes(scaled @ model_text.T, scale[i])
        n_rows = len(softmaxes)
        losses[i] = (log_sums / 2 - diagonal) / n_rows
        factor = scale[i] / (2 * n_rows)
        by_image = by_images[i]
        by_text = by_texts[i]
        # beta=-2 takes the 2 of the diagonal off without a change of the softmaxes.
        torch.addmm(model_text, softmaxes, model_text, beta=-2, out=by_image).mul_(factor)
        torch.addmm(model_image, softmaxes.T, model_image, beta=-2, out=by_text).mul_(factor)
        by_scales[i] = torch.dot(by_image.flatten(), model_image.flatten())
    return losses, (by_images, by_texts, by_scales)


@torch.no_grad()
def batched_sigmoid(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    same: Tensor,
) -> tuple[Tensor, Gradients, Tensor]:
    """Compute `sigmoid_loss` of each model and its gradients, of all models at once.

    The gradient of a logit is (its sigmoid - 1 where the pair is positive) / m.

    Args:
        image: Embeddings, float [k, n, dim], L2-normalized.
        text: Embeddings, float [k, m, dim], L2-normalized.
        scale: The factor of the cosines, float [k].
        bias: What is added to the logits, float [k].
        same: Which pairs are positive, bool [k, n, m] or [1, n, m].

    Returns:
        Losses, float [k]; their gradients by image, text and the logarithm of the scale; and those
        by the bias, float [k].
    """
    n_texts = text.shape[1]
    factor = scale.view(-1, 1, 1)
    logits = torch.baddbmm(bias.view(-1, 1, 1), image * factor, text.mT)
    losses = softplus(torch.where(same, -logits, logits)).sum((1, 2)).div_(n_texts)
    by_logits = logits.sigmoid_().sub_(same.to(logits.dtype)).div_(n_texts)
    by_image = torch.bmm(by_logits, text).mul_(factor)
    by_text = torch.bmm(by_logits.mT, image).mul_(factor)
    by_scale = (by_image * image).sum((1, 2))
    return losses, (by_image, by_text, by_scale), by_logits.sum((1, 2))


@torch.no_grad()
def stacked_sigmoid(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    same: Tensor,
) -> tuple[Tensor, Gradients, Tensor]:
    """Do what `batched_sigmoid` does model by model: the logits of one are in memory at a time."""
    by_images = torch.empty_like(image)
    by_texts = torch.empty_like(text)
    by_scales = torch.empty_like(scale)
    by_biases = torch.empty_like(bias)
    losses = torch.empty_like(scale)
    for i, same_of_model in enumerate(same.expand(len(image), -1, -1)):
        of_model = slice(i, i + 1)
        result = batched_sigmoid(
            image[of_model],
            text[of_model],
            scale[of_model],
            bias[of_model],
            same_of_model[None],
        )
        losses[of_model], gradients, by_biases[of_model] = result
        by_images[of_model], by_texts[of_model], by_scales[of_model] = gradients
    return losses, (by_images, by_texts, by_scales), by_biases


def batched_structure(
    sides: Sequence[tuple[Tensor, Tensor]],
    weight: Tensor,
    temperature: Tensor,
    divergence: Divergence,
) -> tuple[Tensor, Sequence[Tensor]]:
    """Compute the weighted `structure_divergence` of each model, the mean over the sides.

    Autograd goes through all models at once.

    Args:
        sides: For each side the features, float [k, n, in_dim], and embeddings, [k, n, out_dim].
        weight: Of each model, float [k].
        temperature: Divides the similarities of each model, float [k].
        divergence: Which formula.

    Returns:
        Losses, float [k], and for each side their gradients by the embeddings.
    """
    of_models = torch.func.vmap(partial(structure_divergence, kind=divergence))
    with torch.enable_grad():
        embeddings = [after.detach().requires_grad_() for _, after in sides]
        terms: list[Tensor] = []
        for (before, _), after in zip(sides, embeddings, strict=True):
            terms.append(of_models(before.float(), after, temperature))
        losses = weight * torch.stack(terms).mean(0)
        gradients = torch.autograd.grad(losses.sum(), embeddings)
    return losses.detach(), gradients


def _softmaxes(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the loss and its gradient take from logits [n, n], which are overwritten.

    Returns:
        The sum of the log-sum-exps of all rows and columns; the softmax by rows plus that by
        columns, float [n, n].
    """
    if logits.device.type == "cpu" and float(scale) <= SAFE_SCALE:
        rows = logits.exp_().sum(1)
        columns = logits.sum(0)
        logs = rows.log().sum() + columns.log().sum()
        reciprocals = rows.reciprocal_().unsqueeze(1) + columns.reciprocal_()
        return logs, logits.mul_(reciprocals)
    return _softmaxes_of_any_scale(logits)


def _softmaxes_of_any_scale(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Do the same without the value of the scale, for which the host would wait for the device."""
    rows = logits.logsumexp(1)
    columns = logits.logsumexp(0)
    by_rows = (logits - rows.unsqueeze(1)).exp_()
    by_columns = logits.sub_(columns).exp_()
    logs = rows.sum() + columns.sum()
    return logs, by_rows.add_(by_columns)
