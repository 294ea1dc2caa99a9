"""InfoNCE of several models at once, each with a batch of its own."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def stacked_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """float [k]: `info_nce` of image[i], text[i] ([k, n, dim], normalised) and scale[i].

    Gradients are made with the losses, model by model, so that one model's logits [n, n] are in memory at a time, and
    in the caches of a processor. One backward pass, of the first order.
    """
    found: Tensor = _StackedInfoNce.apply(image, text, scale)
    return found


class _StackedInfoNce(torch.autograd.Function):
    """The gradient of a logit is (softmax of its row + softmax of its column - 2 on the diagonal) / 2n."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        grad_image, grad_text, grad_scale = torch.empty_like(image), torch.empty_like(text), torch.empty_like(scale)
        losses = torch.empty_like(scale)
        for i in range(len(scale)):
            logits = (image[i] @ text[i].T).mul_(scale[i])
            rows, columns = logits.logsumexp(1), logits.logsumexp(0)
            losses[i] = (rows.mean() + columns.mean()) / 2 - logits.diagonal().mean()
            pull = (logits - rows.unsqueeze(1)).exp_().add_(logits.sub_(columns).exp_())
            pull.diagonal().sub_(2)
            pull.mul_(scale[i] / (2 * len(logits)))
            torch.mm(pull, text[i], out=grad_image[i])
            torch.mm(pull.T, image[i], out=grad_text[i])
            grad_scale[i] = torch.vdot(grad_image[i].flatten(), image[i].flatten()) / scale[i]
        ctx.save_for_backward(grad_image, grad_text, grad_scale)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale = ctx.saved_tensors
        each = gradient.view(-1, 1, 1)
        needed = ctx.needs_input_grad
        return image.mul_(each) if needed[0] else None, text.mul_(each) if needed[1] else None, scale * gradient
