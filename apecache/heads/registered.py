"""Register heads of one's own, which recipes then name: `kind = "custom"`, `custom = "NAME"`."""

from collections.abc import Callable

from torch import nn

from apecache.arguments import require_type
from apecache.errors import OptionError, RecipeError, nearest

BuildBody = Callable[[int, int], nn.Module]
"""Builds a module from (in_dim, out_dim): float32 [n, in_dim] to [n, out_dim]."""

_BUILDERS: dict[str, BuildBody] = {}


def register_head(name: str) -> Callable[[BuildBody], BuildBody]:
    """Register a head on pooled features under a name; use it as a decorator.

    The decorated class or function is called with (in_dim, out_dim) and returns a module that maps
    float32 [n, in_dim] to [n, out_dim]. Standardization before it and L2 normalization after it are
    added, as for all heads. A run keeps the name and the weights, not the code: register the head
    again before a program opens the run. Change the name when the code changes.

    Args:
        name: What a recipe calls the head.

    Raises:
        OptionError: Another head has this name, or the name is not a text.

    Example:
        >>> @register_head("two-layers")
        ... class TwoLayers(nn.Sequential):
        ...     def __init__(self, in_dim: int, out_dim: int) -> None:
        ...         super().__init__(nn.Linear(in_dim, 512), nn.GELU(), nn.Linear(512, out_dim))
    """
    require_type(name, str, "name")

    def register(build: BuildBody) -> BuildBody:
        registered = _BUILDERS.get(name)
        if registered is not None and _origin(registered) != _origin(build):
            raise OptionError(f"head {name!r} is registered already; choose another name")
        _BUILDERS[name] = build
        return build

    return register


def registered_head(name: str) -> BuildBody:
    """Return what builds a registered head.

    Raises:
        RecipeError: No head of this name is registered in this program.
    """
    if name not in _BUILDERS:
        raise RecipeError(
            f"head {name!r} is not registered in this program; import the module that calls "
            f"apecache.register_head({name!r}){nearest(name, list(_BUILDERS))}"
        )
    return _BUILDERS[name]


def _origin(build: BuildBody) -> tuple[str, str]:
    # A cell of a notebook that runs again defines the same name once more.
    return build.__module__, getattr(build, "__qualname__", type(build).__qualname__)
