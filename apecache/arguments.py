"""Checks of what a public function is given, so that a wrong type is named at once and not deep
inside."""

import os
from collections.abc import Mapping
from pathlib import Path

from apecache.errors import OptionError

AnyPath = str | os.PathLike[str]
MADE_BY: Mapping[str, str] = {
    "EncoderSpec": "parse_encoder(text, modality)",
    "ExtractSpec": "ExtractSpec(image=…, text=…)",
    "FeatureStore": "FeatureStore.open(path)",
    "LabelledSpec": "LabelledSpec(open_pairs(path), caches)",
    "LawsSetting": "LawsSetting(pairs, encoders, work)",
    "PairSource": "open_pairs(path)",
    "Query": "Query(like=[text])",
    "ScoutSpec": "ScoutSpec(image, text)",
    "ServeSpec": "ServeSpec(index)",
    "Space": "load_space(path, recipes)",
    "TrainedEncoders": "load_encoders(folder)",
    "TrainedHeads": "load_heads(folder)",
    "ZeroShotSpec": "ZeroShotSpec(images)",
}
"""How to make what a function expects, by the name of its type."""


def wrong_type(value: object, expected: str, name: str) -> OptionError:
    """The error for an argument of a wrong type: its name, what was expected, what was found."""
    return OptionError(f"{name}: expected {expected}, found {type(value).__name__}")


def require_type(
    value: object,
    types: type | tuple[type, ...],
    name: str,
    optional: bool = False,
) -> None:
    """Refuse an argument of another type than these.

    Args:
        name: of the argument.
        optional: None is allowed as well.

    Raises:
        OptionError: another type, with how to make one of the first.
    """
    expected = types if isinstance(types, tuple) else (types,)
    if isinstance(value, expected) or (optional and value is None):
        return
    names = " or ".join(one.__name__ for one in expected)
    hint = MADE_BY.get(expected[0].__name__)
    error = wrong_type(value, names, name)
    raise OptionError(f"{error}; make one with: {hint}") if hint else error


def as_path(value: object, name: str) -> Path:
    """An argument that is a path, as a `Path`. Raises OptionError for another type, or an empty
    text."""
    return Path(as_place(value, name))


def as_place(value: object, name: str) -> str | Path:
    """An argument that is a path or a URL of object storage, as it was given. Raises as `as_path`
    does."""
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise wrong_type(value, "a path (str or os.PathLike)", name)
    if not path:
        raise OptionError(f"{name}: expected a path, found an empty text")
    return Path(path) if isinstance(value, os.PathLike) else path


def as_texts(values: object, name: str) -> tuple[str, ...]:
    """An argument that is a list of texts. Raises OptionError for a single text, or for what is no
    text in it."""
    if isinstance(values, str | bytes | os.PathLike):
        raise OptionError(
            f"{name}: a list of texts is expected, found a single {type(values).__name__}; "
            "put it in brackets"
        )
    try:
        texts: tuple[str, ...] = tuple(values)  # type: ignore[arg-type]
    except TypeError:
        raise wrong_type(values, "a list of texts", name) from None
    for number, text in enumerate(texts):
        require_type(text, str, f"{name}[{number}]")
    return texts
