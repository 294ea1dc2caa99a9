"""Merge recipe files: `extends = "…"` names the recipe whose settings a file begins with."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apecache.errors import RecipeError

EXTENDS = "extends"
NOT_INHERITED = frozenset({EXTENDS, "name", "source", "summary"})
"""Keys that describe one recipe alone."""


@dataclass(frozen=True, kw_only=True)
class RecipeLayer:
    """Hold what one recipe sets itself, before it is merged with its base."""

    name: str
    """Of a packaged recipe, or the path of a file."""
    values: Mapping[str, Any]

    def base(self) -> str | None:
        """Return the name or path of the recipe that this one extends; None without one.

        Raises:
            RecipeError: the value is no text.
        """
        if EXTENDS not in self.values:
            return None
        base = self.values[EXTENDS]
        if not isinstance(base, str):
            raise RecipeError(
                f"{self.name}: extends: expected the name of a recipe or a path of a .toml file, "
                f"found {type(base).__name__}"
            )
        if not is_file(base):
            return base
        # A base is named as seen from the recipe that extends it.
        return os.path.join(os.path.dirname(self.name), base)


def is_file(name: str) -> bool:
    """Tell whether a recipe is given as a file.

    The ending decides, not a look at the disk: a recipe's name never means a file.
    """
    return name.endswith(".toml")


def require_no_cycle(layers: Sequence[RecipeLayer], base: str) -> None:
    """Refuse a base that is one of the recipes that led to it.

    Raises:
        RecipeError: with the names in the order in which they extend one another.
    """
    if _identity(base) not in {_identity(layer.name) for layer in layers}:
        return
    names = [*(layer.name for layer in layers), base]
    raise RecipeError(f"{names[0]}: extends in a circle: {' -> '.join(names)}")


def merged_layers(layers: Sequence[RecipeLayer]) -> dict[str, Any]:
    """Merge recipes into the values of the first one.

    A key replaces the base's key of that name. A section is merged with the base's section key by
    key; sections inside it are replaced whole.

    Args:
        layers: a recipe, then its base, then the base of that.
    """
    outermost, *bases = layers
    merged: dict[str, Any] = {}
    # From the innermost outwards, so that the recipe itself has the last word.
    for layer in reversed(bases):
        inherited = {key: layer.values[key] for key in layer.values if key not in NOT_INHERITED}
        merged = _merged_sections(merged, inherited)
    values = {key: value for key, value in outermost.values.items() if key != EXTENDS}
    return _merged_sections(merged, values)


def _merged_sections(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in values.items():
        base_value = base.get(key)
        # Sections merge setting by setting; all other values replace the base's.
        if isinstance(base_value, dict) and isinstance(value, dict):
            merged[key] = {**base_value, **value}
        else:
            merged[key] = value
    return merged


def _identity(name: str) -> str:
    """Return the same text for every path of one file."""
    return os.path.realpath(name) if is_file(name) else name
