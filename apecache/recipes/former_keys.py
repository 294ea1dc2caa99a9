"""Read recipes and heads as earlier versions recorded them: other names, fewer keys."""

from collections.abc import Mapping
from typing import Any

NEW_KEYS = {"optimiser": "optimizer", "standardise": "standardize"}
"""New name of a key by its former name."""
NEW_KINDS = {"several": "ensemble"}
"""New kind of a head by its former name."""
ADDED_KEYS = {"initialization": "torch"}
"""Keys of a head that earlier versions did not have, with the value that means what they did."""
FORMER_KEYS = {new: former for former, new in NEW_KEYS.items()}
FORMER_KINDS = {new: former for former, new in NEW_KINDS.items()}


def with_new_keys(value: Any) -> Any:
    """Return JSON that an earlier version recorded, with the names of today."""
    return _renamed(value, NEW_KEYS, NEW_KINDS)


def with_former_keys(value: Any) -> Any:
    """Return JSON as earlier versions recorded it.

    Digests are computed from these names: the indexes and runs that hold such a digest stay valid.
    """
    return _renamed(_without_added(value), FORMER_KEYS, FORMER_KINDS)


def _without_added(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_added(item)
            for key, item in value.items()
            if key not in ADDED_KEYS or item != ADDED_KEYS[key]
        }
    if isinstance(value, list | tuple):
        return [_without_added(item) for item in value]
    return value


def _renamed(value: Any, keys: Mapping[str, str], kinds: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        renamed = {keys.get(key, key): _renamed(item, keys, kinds) for key, item in value.items()}
        if renamed.get("kind") in kinds:
            renamed["kind"] = kinds[renamed["kind"]]
        return renamed
    if isinstance(value, list | tuple):
        return [_renamed(item, keys, kinds) for item in value]
    return value
