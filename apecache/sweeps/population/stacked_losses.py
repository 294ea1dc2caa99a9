"""InfoNCE of several models at once, each with a batch of its own, and its gradients in closed
form."""

import torch
from torch import Tensor

SAFE_SCALE = 40.0
"""Cosines times up to this have exponentials and sums of them within float32, so that one
exponential serves both softmaxes."""
Gradients = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def stacked_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, Gradients]:
    """Losses float [k], `info_nce` of image[i], text[i] ([k, n, dim], normalised) and scale[i], and
    their gradients by image, text and scale.

    Model by model, so that one model's logits [n, n] are in memory at a time, and in the caches of
    a processor. The gradient of a logit is (softmax of its row + softmax of its column - 2 on the
    diagonal) / 2n.
    """
    gradients = torch.empty_like(image), torch.empty_like(text), torch.empty_like(scale)
    losses = torch.empty_like(scale)
    for i in range(len(scale)):
        scaled = image[i] * scale[i]
        diagonal = (scaled * text[i]).sum()
        sums, pull = _softmaxes(scaled @ text[i].T, scale[i])
        losses[i] = (sums / 2 - diagonal) / len(pull)
        by_image = gradients[0][i]
        by_text = gradients[1][i]
        half = scale[i] / (2 * len(pull))
        torch.addmm(text[i], pull, text[i], beta=-2, out=by_image).mul_(half)
        torch.addmm(image[i], pull.T, image[i], beta=-2, out=by_text).mul_(half)
        gradients[2][i] = torch.dot(by_image.flatten(), image[i].flatten()) / scale[i]
    return losses, gradients


def _softmaxes(logits: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the logarithms of the sums over rows and over columns, and softmax by rows + softmax
    by columns. Uses up the logits."""
    if logits.device.type == "cpu" and float(scale) <= SAFE_SCALE:
        rows = logits.exp_().sum(1)
        columns = logits.sum(0)
        logs = rows.log().sum() + columns.log().sum()
        return logs, logits.mul_(rows.reciprocal_().unsqueeze(1) + columns.reciprocal_())
    return _softmaxes_of_any_scale(logits)


def _softmaxes_of_any_scale(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The same without asking for the scale, for which a device would have to be waited for."""
    rows = logits.logsumexp(1)
    columns = logits.logsumexp(0)
    by_rows = (logits - rows.unsqueeze(1)).exp_()
    return rows.sum() + columns.sum(), by_rows.add_(logits.sub_(columns).exp_())
