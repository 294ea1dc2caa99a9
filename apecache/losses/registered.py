"""Register losses of one's own, which recipes then name: `kind = "custom"`, `custom = "NAME"`."""

from collections.abc import Callable

from torch import Tensor

from apecache.heads.registered import Registry
from apecache.losses.contrastive import Groups

ComputeLoss = Callable[[Tensor, Tensor, Tensor, Groups | None], Tensor]
"""Computes a scalar from (image, text, scale, groups)."""
LOSSES: Registry[ComputeLoss] = Registry("loss")


def register_loss(name: str) -> Callable[[ComputeLoss], ComputeLoss]:
    """Register a loss under a name; use it as a decorator.

    The decorated function is called with image embeddings, float [n, dim], text embeddings, float
    [m, dim], both L2-normalized, the scale of the logits (1 / temperature, a scalar tensor that
    may learn), and `groups`: `groups.image` and `groups.text` are int64 [n] and [m], and an image
    and a text of one group belong together. Without groups (None), n = m and row i belongs to row
    i. It returns a scalar. It must not wait for the device.

    Args:
        name: What a recipe calls the loss.

    Raises:
        OptionError: Another loss has this name, or the name is not a text.

    Example:
        >>> @register_loss("cosine")
        ... def cosine(image, text, scale, groups):
        ...     return 1 - (image * text).sum(1).mean()
    """
    return LOSSES.register(name)
