"""Register losses of one's own, which recipes then name: `kind = "custom"`, `custom = "NAME"`."""

from collections.abc import Callable

from torch import Tensor

from apecache.arguments import require_type
from apecache.errors import OptionError, RecipeError, nearest
from apecache.losses.contrastive import Groups

ComputeLoss = Callable[[Tensor, Tensor, Tensor, Groups | None], Tensor]
"""Computes a scalar from (image, text, scale, groups)."""

_LOSSES: dict[str, ComputeLoss] = {}


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
    require_type(name, str, "name")

    def register(compute: ComputeLoss) -> ComputeLoss:
        registered = _LOSSES.get(name)
        if registered is not None and _origin(registered) != _origin(compute):
            raise OptionError(f"loss {name!r} is registered already; choose another name")
        _LOSSES[name] = compute
        return compute

    return register


def registered_loss(name: str) -> ComputeLoss:
    """Return a registered loss.

    Raises:
        RecipeError: No loss of this name is registered in this program.
    """
    if name not in _LOSSES:
        raise RecipeError(
            f"loss {name!r} is not registered in this program; import the module that calls "
            f"apecache.register_loss({name!r}){nearest(name, list(_LOSSES))}"
        )
    return _LOSSES[name]


def _origin(compute: ComputeLoss) -> tuple[str, str]:
    # A cell of a notebook that runs again defines the same name once more.
    return compute.__module__, getattr(compute, "__qualname__", type(compute).__qualname__)
