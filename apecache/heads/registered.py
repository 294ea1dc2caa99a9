"""Register heads of one's own, which recipes then name: `kind = "custom"`, `custom = "NAME"`."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

from apecache.arguments import require_type
from apecache.errors import OptionError, RecipeError, nearest

BuildBody = Callable[[int, int], nn.Module]
"""Builds a module from (in_dim, out_dim): float32 [n, in_dim] to [n, out_dim]."""
Registered = TypeVar("Registered", bound=Callable[..., Any])


class Registry(Generic[Registered]):
    """Hold the functions that a program has registered, each under a name.

    Args:
        noun: What is registered, for messages: `head` or `loss`.
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self.by_name: dict[str, Registered] = {}

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Return a decorator that registers a function under a name.

        Raises:
            OptionError: Another function has this name, or the name is not a text.
        """
        require_type(name, str, "name")

        def decorate(function: Registered) -> Registered:
            registered = self.by_name.get(name)
            # A cell of a notebook that runs again defines the same function once more.
            if registered is not None and _origin(registered) != _origin(function):
                raise OptionError(
                    f"{self.noun} {name!r} is registered already; choose another name"
                )
            self.by_name[name] = function
            return function

        return decorate

    def find(self, name: str) -> Registered:
        """Return what is registered under a name.

        Raises:
            RecipeError: Nothing of this name is registered in this program.
        """
        if name not in self.by_name:
            raise RecipeError(
                f"{self.noun} {name!r} is not registered in this program; import the module that "
                f"calls apecache.register_{self.noun}({name!r}){nearest(name, list(self.by_name))}"
            )
        return self.by_name[name]


HEADS: Registry[BuildBody] = Registry("head")


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
    return HEADS.register(name)


def _origin(function: Callable[..., Any]) -> tuple[str, str]:
    return function.__module__, getattr(function, "__qualname__", type(function).__qualname__)
