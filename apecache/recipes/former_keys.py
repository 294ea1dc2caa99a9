"""Read recipes and heads as earlier versions recorded them: other names, fewer keys."""

from collections.abc import Mapping
from typing import Any

NEW_KEYS = {"optimiser": "optimizer", "standardise": "standardize"}
"""New name of a key by its former name."""
NEW_KINDS = {"several": "ensemble"}
"""New kind of a head by its former name."""
LATER_DEFAULTS: dict[str, Any] = {
    "custom": "",
    "initialization": "torch",
    "join": "concat",
    "widths": [],
}
"""Keys that earlier versions did not have, with the value that means what they did."""
FORMER_KEYS = {new: former for former, new in NEW_KEYS.items()}
FORMER_KINDS = {new: former for former, new in NEW_KINDS.items()}


def with_new_keys(value: Any) -> Any:
    """Return JSON that an earlier version recorded, with the names of today."""
    return _renamed(value, NEW_KEYS, NEW_KINDS)


def with_former_keys(value: Any) -> Any:
    """Return JSON as earlier versions recorded it.

    Digests are computed from these names: the indexes and runs that hold such a digest stay valid.
    """
    return _renamed(_without_later_defaults(value), FORMER_KEYS, FORMER_KINDS)


def _without_later_defaults(value: Any) -> Any:
    """Leave out keys that earlier versions did not have, where they have their defaults."""
    if isinstance(value, dict):
        return {
            key: _without_later_defaults(item)
            for key, item in value.items()
            if not _is_later_default(key, item)
        }
    if isinstance(value, list | tuple):
        return [_without_later_defaults(item) for item in value]
    return value


def _is_later_default(key: str, value: Any) -> bool:
    if key not in LATER_DEFAULTS:
        return False
    # JSON has lists where a model has tuples.
    json_value = list(value) if isinstance(value, tuple) else value
    return bool(json_value == LATER_DEFAULTS[key])


def _renamed(value: Any, keys: Mapping[str, str], kinds: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        renamed = {keys.get(key, key): _renamed(item, keys, kinds) for key, item in value.items()}
        if renamed.get("kind") in kinds:
            renamed["kind"] = kinds[renamed["kind"]]
        return renamed
    if isinstance(value, list | tuple):
        return [_renamed(item, keys, kinds) for item in value]
    return value
