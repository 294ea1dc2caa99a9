"""Read the texts beside an image: `.txt`, `.caption`, `.json` and `.cls` of the same name.

Samples of tars and images in folders share these rules.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from apecache.data.columns import (
    LABEL_COLUMNS,
    LANGUAGE_COLUMNS,
    fill_template,
    template_names,
    to_captions,
    to_text,
)
from apecache.data.further_columns import requested_columns
from apecache.data.pairs import SourceFields, TableRow
from apecache.data.spec import SPLITS, OpenSpec
from apecache.errors import ManifestError, nearest

CAPTION_ENDINGS = ("txt", "caption")
TEXT_ENDINGS = (*CAPTION_ENDINGS, "json", "cls")
JSON_CAPTIONS = ("caption", "captions", "text")
TEXT_SIDECAR_OPTIONS = ("caption_ext", "caption_lines")
SIDECAR_OPTIONS = (
    "caption_column",
    "split_column",
    "label_column",
    "key_column",
    "caption_template",
    "columns",
    *TEXT_SIDECAR_OPTIONS,
)
"""Options that images with texts can follow; most of them name fields of `.json`."""
BOXES = re.compile(r"(?:[-+\d.eE]+\s+){4,}[-+\d.eE]+\s*")
"""A text of numbers, such as the boxes of a detector's training data."""
ONE_CAPTION = "texts of several lines, read as one caption (--caption-lines reads each line as one)"


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Hold the texts of one image."""

    key: str
    """Name of the image."""
    location: str
    """The sample, for error messages."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Content by ending."""
    split: str = ""
    """Split that its folder or tar says."""
    label: str = ""
    """Label that its folder says."""


@dataclass(frozen=True, kw_only=True)
class SidecarRules:
    """Say how texts beside images are read."""

    caption_lines: bool
    """Whether each line of a text is a caption."""
    class_names: tuple[str, ...] = ()
    """Names of the classes that `.cls` numbers."""


def is_boxes(text: str) -> bool:
    """Return whether a text is only numbers, five or more."""
    return BOXES.fullmatch(text) is not None


def rules_near(folder: Path, spec: OpenSpec) -> SidecarRules:
    """Return the rules that clip_benchmark's files say, in a folder or the one above it.

    `dataset_type.txt` says whether texts are lists of captions, `classnames.txt` names the classes.
    """
    dataset_type = _text_near(folder, "dataset_type.txt").strip().lower()
    class_names = _text_near(folder, "classnames.txt").splitlines()
    return SidecarRules(
        caption_lines=spec.caption_lines or dataset_type == "retrieval",
        class_names=tuple(name.strip() for name in class_names if name.strip()),
    )


def _text_near(folder: Path, name: str) -> str:
    candidates = [folder / name]
    # clip_benchmark's own files lie beside the folders of the splits, which hold the tars. Nothing
    # is opened above a folder of any other name.
    if folder.absolute().name in SPLITS:
        candidates.append(folder.absolute().parent / name)
    for candidate in candidates:
        try:
            return candidate.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
    return ""


def sidecar_rows(
    sidecars: Sequence[Sidecar],
    rules: SidecarRules,
    origin: str,
    spec: OpenSpec,
) -> tuple[list[TableRow], SourceFields, Counter[str]]:
    """Return a row for each image, the fields of each role, and what was left out.

    The caption is that of the JSON fields which the spec names, or else `.txt`, `.caption`, or the
    field `caption` of `.json`. The label is `.cls` or the field `label`. JSON fields are called
    `json.FIELD`.

    Raises:
        ManifestError: A JSON is damaged, or none has the field that the spec names.
    """
    records = [_json(sidecar.texts.get("json"), sidecar.location) for sidecar in sidecars]
    names: dict[str, None] = {}
    for record in records:
        names |= dict.fromkeys(record)
    fields = _json_fields(list(names), origin, spec)
    skipped: Counter[str] = Counter()
    rows = []
    for line, (sidecar, record) in enumerate(zip(sidecars, records, strict=True), 1):
        captions = _captions(sidecar, record=record, fields=fields, rules=rules, spec=spec)
        # Several lines of one text are one caption, unless --caption-lines says otherwise.
        if len(captions) == 1 and "\n" in captions[0]:
            skipped[ONE_CAPTION] += 1
        label = _label(sidecar, rules) or _value(record, fields.label, sidecar.location)
        row = TableRow(
            line=line,
            image=sidecar.key,
            key=_value(record, fields.key, sidecar.location),
            captions=captions,
            split=_value(record, fields.split, sidecar.location) or sidecar.split,
            language=_value(record, fields.language, sidecar.location),
            label=label or sidecar.label,
            further=tuple(_value(record, name, sidecar.location) for name in fields.further),
        )
        rows.append(row)
    return rows, _source_fields(sidecars, list(names), fields=fields, spec=spec), skipped


@dataclass(frozen=True, kw_only=True)
class _JsonFields:
    """Name the JSON fields of each role."""

    captions: tuple[str, ...]
    requested: bool
    """Whether the user names the fields of captions."""
    key: str | None
    split: str | None
    label: str | None
    language: str | None
    further: tuple[str, ...]
    """Further columns."""


def _json_fields(names: Sequence[str], origin: str, spec: OpenSpec) -> _JsonFields:
    captions: tuple[str, ...] = ()
    patterns = spec.caption_column or ()
    for pattern in (patterns,) if isinstance(patterns, str) else patterns:
        matches = [name for name in names if name == pattern or fnmatchcase(name, pattern)]
        if not matches:
            raise _no_field(pattern, "--caption-column", names=names, origin=origin)
        captions += tuple(matches)
    requested = [
        ("--key-column", spec.key_column),
        ("--split-column", spec.split_column),
        ("--label-column", spec.label_column),
    ]
    requested += [("--caption-template", name) for name in template_names(spec.caption_template)]
    further = requested_columns(spec)
    requested += [("--column", name) for name in further]
    for flag, name in requested:
        if name is not None and name not in names:
            raise _no_field(name, flag, names=names, origin=origin)
    # A split from elsewhere replaces the source's own, which is then not read.
    default_split = "split" if "split" in names and not spec.resplits else None
    return _JsonFields(
        # Only the first that exists: the same text under two names would count twice.
        captions=captions or tuple(name for name in JSON_CAPTIONS if name in names)[:1],
        requested=bool(captions) or spec.caption_template is not None,
        key=spec.key_column,
        split=spec.split_column or default_split,
        label=spec.label_column or next((name for name in LABEL_COLUMNS if name in names), None),
        language=next((name for name in LANGUAGE_COLUMNS if name in names), None),
        further=further,
    )


def _no_field(name: str, flag: str, names: Sequence[str], origin: str) -> ManifestError:
    shown = ", ".join(name if name.isprintable() else repr(name) for name in names) or "none"
    return ManifestError(
        f"{origin}: no .json has the field {name!r}; fields found: {shown}{nearest(name, names)}; "
        f"{flag} takes one of them"
    )


def _captions(
    sidecar: Sidecar,
    record: Mapping[str, Any],
    fields: _JsonFields,
    rules: SidecarRules,
    spec: OpenSpec,
) -> tuple[str, ...]:
    if spec.caption_template is not None:
        return fill_template(spec.caption_template, record, sidecar.location)
    ending = next((ending for ending in CAPTION_ENDINGS if ending in sidecar.texts), None)
    # A text beside the image goes before JSON, unless the user names JSON fields.
    if fields.requested or ending is None:
        captions: list[str] = []
        for name in fields.captions:
            captions += to_captions(record.get(name), sidecar.location)
        return tuple(captions)
    text = sidecar.texts[ending].rstrip("\r\n")
    return to_captions(text.splitlines() if rules.caption_lines else text, sidecar.location)


def _label(sidecar: Sidecar, rules: SidecarRules) -> str:
    """Return the label in `.cls`, by name where the classes have names."""
    label = sidecar.texts.get("cls", "").strip()
    # A number without a name stays as it is: not every data set comes with names.
    is_number = label.isdecimal() and int(label) < len(rules.class_names)
    return rules.class_names[int(label)] if is_number else label


def _value(record: Mapping[str, Any], name: str | None, location: str) -> str:
    return to_text(record.get(name), location, name) if name is not None else ""


def _source_fields(
    sidecars: Sequence[Sidecar],
    names: Sequence[str],
    fields: _JsonFields,
    spec: OpenSpec,
) -> SourceFields:
    """Return which endings and JSON fields have which role; a role counts if any image has it."""
    endings: dict[str, None] = {}
    for sidecar in sidecars:
        endings |= dict.fromkeys(sidecar.texts)
    caption = next((ending for ending in CAPTION_ENDINGS if ending in endings), None)
    json_captions = [f"json.{name}" for name in fields.captions]
    if spec.caption_template is not None:
        caption = spec.caption_template
        json_captions = [f"json.{name}" for name in template_names(spec.caption_template)]
    elif fields.requested or caption is None:
        caption = ", ".join(json_captions) or None
    label = "cls" if "cls" in endings else _named(fields.label)
    used = {caption, label, *map(_named, (fields.key, fields.split, fields.language))}
    used |= set(map(_named, fields.further))
    # Where the text beside the image is the caption, JSON captions are unused.
    if caption not in endings:
        used |= set(json_captions)
    available = [ending for ending in endings if ending != "json"]
    available += [f"json.{name}" for name in names]
    return SourceFields(
        caption=caption,
        key=_named(fields.key),
        split=_named(fields.split),
        label=label,
        language=_named(fields.language),
        unused=tuple(name for name in available if name not in used),
        further=fields.further,
        columns=tuple(names),
    )


def _named(name: str | None) -> str | None:
    return None if name is None else f"json.{name}"


def _json(text: str | None, location: str) -> dict[str, Any]:
    """Return the fields of an image's JSON; none if it has no JSON."""
    try:
        record = json.loads(text) if text is not None else {}
    # Deeply nested brackets end in a RecursionError, which is bad input as well.
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{location}: its .json cannot be read ({error})") from None
    if not isinstance(record, dict):
        raise ManifestError(
            f"{location}: its .json is a {type(record).__name__}; expected an object"
        )
    return record
