"""Open captions in one JSON file: Karpathy's splits and COCO's annotations.

Karpathy and Fei-Fei (arXiv:1412.2306) publish dataset_coco.json, dataset_flickr8k.json and
dataset_flickr30k.json: `images`, each with `filename`, `split`, `sentences` (their `raw` is the
caption) and, for COCO, the folder `filepath`. COCO (captions_train2017.json and the like) has
`images` with `id` and `file_name`, and beside them `annotations` with `image_id` and `caption`. A
list of objects is a table.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apecache.data.columns import to_text
from apecache.data.images import SUFFIXES
from apecache.data.json_lines import json_records, with_names
from apecache.data.media import media_below
from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import FILE_OPTIONS, SPLITS, OpenSpec, refuse_url, require_only
from apecache.data.tables import open_records
from apecache.data.text_files import open_text
from apecache.errors import ManifestError, OptionError

RESTVAL = "restval"
"""COCO images of the official validation set that Karpathy adds to train."""

KINDS = (
    "Karpathy's (images with sentences) or COCO's captions (images and annotations with captions)"
)


def open_annotations(path: Path, spec: OpenSpec) -> PairSource:
    """Open one JSON file of captions, all captions of each image together.

    Annotations of an image that the file does not list keep a row, which is quarantined when its
    image is read. Image paths are relative to the file's folder, or to `spec.root`.

    Raises:
        ManifestError: The file is not JSON or has neither of the two formats, a record lacks a
            field, or an image is named twice.
    """
    content = _load(path)
    table = _as_table(content)
    if table:
        if not spec.restval:
            raise OptionError(f"{path}: a table; --no-restval is for Karpathy's JSON: leave it out")
        names, records = with_names(list(enumerate(table, 1)))
        return open_records(names, records, path=path, spec=spec)
    require_only(spec, path, *FILE_OPTIONS)
    # Both formats have `images`; their other fields tell them apart.
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise ManifestError(f"{path}: {_found(content)}; expected {KINDS}, or a list of objects")
    if images and all("sentences" in image for image in images):
        pairs = _karpathy(images, path, spec.restval)
        fields = SourceFields(image="filename", caption="sentences.raw", split="split")
    elif _has_captions(content.get("annotations")):
        pairs = _coco(images, content["annotations"], path)
        fields = SourceFields(image="file_name", caption="annotations.caption")
    else:
        raise ManifestError(f"{path}: {_found(content)}, of neither kind; expected {KINDS}")
    fields = replace(fields, unused=_unused(images, fields))
    _require_unique(pairs, path)
    return PairSource(
        pairs,
        origin=str(path),
        media=media_below(spec.root or path.parent, spec.allow_root),
        fields=fields,
    )


def _as_table(content: Any) -> list[dict[str, Any]]:
    """Return the records of a list of objects, or of an object of captions by image.

    Empty for anything else.
    """
    if isinstance(content, list) and all(isinstance(entry, dict) for entry in content):
        return content
    if isinstance(content, dict) and all(name.lower().endswith(SUFFIXES) for name in content):
        return [{"image": name, "caption": captions} for name, captions in content.items()]
    return []


def _unused(images: list[dict[str, Any]], fields: SourceFields) -> tuple[str, ...]:
    """Return the fields of the images that no role uses."""
    # An image's path can have two fields, and COCO joins captions by `id`.
    used_names = {fields.image, "filepath", "id", fields.split, "sentences"}
    names: dict[str, None] = {}
    for image in images:
        names |= dict.fromkeys(image)
    return tuple(name for name in names if name not in used_names)


def _load(path: Path) -> Any:
    try:
        with open_text(path) as file:
            return json.load(file)
    except json.JSONDecodeError as error:
        # JSON lines are often called .json.
        if error.msg == "Extra data" and error.lineno > 1:
            return [record for _, record in json_records(path)[1]]
        raise ManifestError(
            f"{path}, line {error.lineno}: no JSON ({error.msg}); expected {KINDS}"
        ) from None
    except ManifestError:
        raise
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path}: no JSON that can be read ({error}); expected {KINDS}"
        ) from None


def _found(content: object) -> str:
    """Describe the file's top-level value for an error message."""
    if isinstance(content, dict):
        first_names = map(repr, list(content)[:6])
        return f"an object with {', '.join(first_names) or 'nothing in it'}"
    return f"a {type(content).__name__}"


def _has_captions(annotations: object) -> bool:
    if not isinstance(annotations, list) or not annotations:
        return False
    return all(
        isinstance(annotation, dict) and "caption" in annotation for annotation in annotations
    )


def _karpathy(images: list[dict[str, Any]], path: Path, restval: bool) -> tuple[Pair, ...]:
    """Return the pairs of Karpathy's images; `restval` keeps those of the split `restval`."""
    pairs = []
    for number, image in enumerate(images):
        location = f"{path}, images[{number}]"
        name = _field(image, name="filename", expected_type=str, location=location)
        split = _field(image, name="split", expected_type=str, location=location)
        if split == RESTVAL and not restval:
            continue
        folder = ""
        if "filepath" in image:
            folder = _field(image, name="filepath", expected_type=str, location=location)
        sentences = _field(image, name="sentences", expected_type=list, location=location)
        texts = [_raw(sentence, location) for sentence in sentences]
        captions = tuple(text for text in texts if text)
        key = f"{folder}/{name}" if folder else name
        refuse_url(key, location)
        split = SPLITS["train"] if split == RESTVAL else SPLITS.get(split, split)
        pairs.append(Pair(key=key, captions=captions, languages=("",) * len(captions), split=split))
    return tuple(pairs)


def _raw(sentence: object, location: str) -> str:
    """Return the caption of one of Karpathy's sentences."""
    if not isinstance(sentence, dict):
        raise ManifestError(
            f"{location}: a sentence is a {type(sentence).__name__}; expected an object with 'raw'"
        )
    text: str = _field(sentence, name="raw", expected_type=str, location=location)
    return text


def _coco(
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    path: Path,
) -> tuple[Pair, ...]:
    """Return the pairs of COCO's images, joined with their annotations by the image's id."""
    ids = _image_values(images, name="id", expected_type=int | str, path=path)
    captions: dict[Any, list[str]] = {number: [] for number in ids}
    # Two images of one id have left one list of captions.
    if len(captions) < len(images):
        raise ManifestError(f"{path}: two images have the same id; every image needs its own")
    orphans: dict[Any, list[str]] = {}
    for number, annotation in enumerate(annotations):
        location = f"{path}, annotations[{number}]"
        image_id = _field(annotation, name="image_id", expected_type=int | str, location=location)
        texts = captions.get(image_id)
        if texts is None:
            texts = orphans.setdefault(image_id, [])
        caption = to_text(annotation["caption"], location, "caption")
        texts += [caption] if caption else []
    keys = _image_values(images, name="file_name", expected_type=str, path=path)
    for number, key in enumerate(keys):
        refuse_url(key, f"{path}, images[{number}]")
    pairs = []
    keys += [f"(no image has the id {image_id})" for image_id in orphans]
    for key, image_captions in zip(keys, [*captions.values(), *orphans.values()], strict=True):
        languages = ("",) * len(image_captions)
        pairs.append(Pair(key=key, captions=tuple(image_captions), languages=languages))
    return tuple(pairs)


def _image_values(
    images: list[dict[str, Any]],
    name: str,
    expected_type: Any,
    path: Path,
) -> list[Any]:
    """Return one field of every image."""
    values = []
    for number, image in enumerate(images):
        location = f"{path}, images[{number}]"
        values.append(_field(image, name=name, expected_type=expected_type, location=location))
    return values


def _field(record: Mapping[str, Any], name: str, expected_type: Any, location: str) -> Any:
    """Return a field of a record, checked to be of a type and not empty."""
    value = record.get(name)
    if not isinstance(value, expected_type) or value == "":
        shown_value = "nothing" if value is None else repr(value)[:40]
        # A union such as `int | str` is no `type`: it has no __name__.
        named_type = isinstance(expected_type, type)
        expected = expected_type.__name__ if named_type else "a number or text"
        raise ManifestError(f"{location}: {name} is {shown_value}; expected {expected}")
    return value


def _require_unique(pairs: tuple[Pair, ...], path: Path) -> None:
    keys: set[str] = set()
    for pair in pairs:
        if pair.key in keys:
            raise ManifestError(
                f"{path}: image {pair.key!r} is named twice; name it once, with all its captions"
            )
        keys.add(pair.key)
    if not pairs:
        raise ManifestError(f"{path}: no images; expected {KINDS}")
