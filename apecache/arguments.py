"""Check the arguments of public functions, so that a wrong type is reported by its name."""

import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from numbers import Integral
from pathlib import Path
from typing import get_args

from apecache.errors import OptionError

AnyPath = str | os.PathLike[str]
MADE_BY: Mapping[str, str] = {
    "EncoderSpec": "parse_encoder(text, modality)",
    "ExtractSpec": "ExtractSpec(image=…, text=…)",
    "FeatureStore": "FeatureStore.open(path)",
    "LabeledSpec": "LabeledSpec(source=open_pairs(path), caches=folder)",
    "PairSource": "open_pairs(path)",
    "Query": "Query(like=[text])",
    "ScoutSpec": "ScoutSpec(image=…, text=…)",
    "ServeSpec": "ServeSpec(index=path)",
    "Space": "load_space(path, recipes)",
    "TrainedEncoders": "load_encoders(folder)",
    "TrainedHeads": "load_heads(folder)",
    "ZeroShotSpec": "ZeroShotSpec(images)",
}
"""The code that makes an argument, by the name of its type, for error messages."""


def wrong_type(value: object, expected: str, name: str) -> OptionError:
    """Return the error for an argument of a wrong type.

    Args:
        value: the argument.
        expected: the expected type, in words.
        name: of the argument.
    """
    return OptionError(f"{name}: expected {expected}, found {type(value).__name__}")


def require_type(
    value: object,
    types: type | tuple[type, ...],
    name: str,
    optional: bool = False,
) -> None:
    """Refuse an argument of another type than these.

    Args:
        value: the argument.
        types: the allowed types.
        name: of the argument.
        optional: None is allowed as well.

    Raises:
        OptionError: another type, with how to make one of the first.
    """
    expected = types if isinstance(types, tuple) else (types,)
    if isinstance(value, expected) or (optional and value is None):
        return
    names = " or ".join(expected_type.__name__ for expected_type in expected)
    # Only classes of this package have a hint; nobody has to be told how to make a str.
    hint = MADE_BY.get(expected[0].__name__)
    error = wrong_type(value, names, name)
    raise OptionError(f"{error}; make one with: {hint}") if hint else error


def require_integer(value: object, name: str, optional: bool = False) -> None:
    """Refuse an argument that is not an integer; a bool is an integer to Python, but no count.

    Args:
        value: the argument; NumPy's integers are allowed.
        name: of the argument.
        optional: None is allowed as well.

    Raises:
        OptionError: another type.
    """
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong_type(value, "int", name)


def require_spec(value: object, expected: type, name: str, optional: bool = False) -> None:
    """Refuse settings of another type, and fields that are no integer or no settings.

    Args:
        value: a dataclass of settings; dataclasses in its fields are checked as well.
        expected: the allowed type.
        name: of the argument.
        optional: None is allowed as well.

    Raises:
        OptionError: another type, or a field that should be an integer or settings.
    """
    require_type(value, expected, name, optional)
    if value is not None:
        _require_fields(value, name)


def _require_fields(settings: object, name: str) -> None:
    if isinstance(settings, type) or not is_dataclass(settings):
        return
    for field in fields(settings):
        value = getattr(settings, field.name)
        field_name = f"{name}.{field.name}"
        if field.type in (int, int | None):
            require_integer(value, field_name, optional=field.type is not int)
            continue
        allowed = _settings_types(field.type)
        if allowed and not isinstance(value, allowed):
            expected = " or ".join(allowed_type.__name__ for allowed_type in allowed)
            raise wrong_type(value, expected.replace("NoneType", "None"), field_name)
        _require_fields(value, field_name)


def _settings_types(annotation: object) -> tuple[type, ...]:
    """Return the types of a field that holds settings, or None; empty for any other field."""
    types = get_args(annotation) or (annotation,)
    if not any(is_dataclass(allowed) for allowed in types):
        return ()
    # A generic or a forward reference cannot be compared with.
    if not all(isinstance(allowed, type) for allowed in types):
        return ()
    return types


def as_path(value: object, name: str) -> Path:
    """Return an argument that is a path as a `Path`.

    Raises:
        OptionError: another type, or an empty text.
    """
    return Path(as_place(value, name))


def as_place(value: object, name: str) -> str | Path:
    """Return an argument that is a path or a URL of object storage, unchanged.

    Raises:
        OptionError: another type, an empty text, or one with a zero byte.
    """
    # `os.fspath` may return bytes, which are refused below.
    path = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(path, str):
        raise wrong_type(value, "a path (str or os.PathLike)", name)
    if not path:
        raise OptionError(f"{name}: expected a path, found an empty text")
    # The functions of `os` raise a bare ValueError.
    if "\0" in path:
        raise OptionError(f"{name}: expected a path, found a zero byte in {path!r}")
    # A text stays a text: `Path` would make one slash of the two in a URL.
    return Path(path) if isinstance(value, os.PathLike) else path


def as_texts(values: object, name: str) -> tuple[str, ...]:
    """Return an argument that is a list of texts as a tuple.

    Raises:
        OptionError: a single text, another type, or an element that is not a text.
    """
    # A single text is iterable as well: it would become a list of its letters.
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
