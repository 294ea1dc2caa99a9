"""Captions in one JSON file: Karpathy's splits and COCO's annotations.

Karpathy and Fei-Fei (arXiv:1412.2306) publish dataset_coco.json, dataset_flickr8k.json and
dataset_flickr30k.json: `images`, each with `filename`, `split`, `sentences` (their `raw` is the
caption) and, for COCO, the folder `filepath`. COCO (captions_train2017.json and the like) has
`images` with `id` and `file_name`, and beside them `annotations` with `image_id` and `caption`.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from apecache.data.columns import to_text
from apecache.data.media import media_below
from apecache.data.pairs import Pair, PairSource, SourceFields
from apecache.data.spec import SPLITS, OpenSpec, refuse_url, require_only
from apecache.data.tables import not_utf8
from apecache.errors import ManifestError

RESTVAL = "restval"
"""COCO images of the official validation set that Karpathy adds to train."""

KINDS = (
    "Karpathy's (images with sentences) or COCO's captions (images and annotations with captions)"
)


def open_annotations(path: Path, spec: OpenSpec) -> PairSource:
    """All captions of each image; image paths are relative to the file's folder, or to `root`.

    Raises:
        ManifestError: no JSON, of neither kind, a record without its fields, an image that is named
            twice.
    """
    require_only(spec, path, "root")
    content = _load(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise ManifestError(
            f"{path}: {_found(content)}; expected {KINDS}. A list of objects goes into a "
            ".jsonl file"
        )
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
        media=media_below(spec.root or path.parent),
        fields=fields,
    )


def _unused(images: list[dict[str, Any]], fields: SourceFields) -> tuple[str, ...]:
    """Fields of the images that are taken as nothing; an image's path has two, and COCO joins
    captions by `id`."""
    taken = {fields.image, "filepath", "id", fields.split, "sentences"}
    names = dict.fromkeys(name for image in images for name in image)
    return tuple(name for name in names if name not in taken)


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ManifestError(not_utf8(path, error)) from None
    except json.JSONDecodeError as error:
        raise ManifestError(
            f"{path}, line {error.lineno}: no JSON ({error.msg}); expected {KINDS}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ManifestError(
            f"{path}: no JSON that can be read ({error}); expected {KINDS}"
        ) from None


def _found(content: Any) -> str:
    if isinstance(content, dict):
        return f"an object with {', '.join(map(repr, list(content)[:6])) or 'nothing in it'}"
    return f"a {type(content).__name__}"


def _has_captions(annotations: Any) -> bool:
    return (
        isinstance(annotations, list)
        and bool(annotations)
        and all(
            isinstance(annotation, dict) and "caption" in annotation for annotation in annotations
        )
    )


def _karpathy(images: list[dict[str, Any]], path: Path, restval: bool) -> tuple[Pair, ...]:
    pairs = []
    for number, image in enumerate(images):
        where = f"{path}, images[{number}]"
        name = _field(image, name="filename", kind=str, where=where)
        split = _field(image, name="split", kind=str, where=where)
        if split == RESTVAL and not restval:
            continue
        folder = (
            _field(image, name="filepath", kind=str, where=where) if "filepath" in image else ""
        )
        captions = tuple(
            _raw(sentence, where)
            for sentence in _field(image, name="sentences", kind=list, where=where)
        )
        key = f"{folder}/{name}" if folder else name
        refuse_url(key, where)
        split = SPLITS["train"] if split == RESTVAL else SPLITS.get(split, split)
        pairs.append(Pair(key=key, captions=captions, languages=("",) * len(captions), split=split))
    return tuple(pairs)


def _raw(sentence: Any, where: str) -> str:
    if not isinstance(sentence, dict):
        raise ManifestError(
            f"{where}: a sentence is a {type(sentence).__name__}; expected an object with 'raw'"
        )
    text: str = _field(sentence, name="raw", kind=str, where=where)
    return text


def _coco(
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    path: Path,
) -> tuple[Pair, ...]:
    where = [f"{path}, images[{number}]" for number in range(len(images))]
    ids = [
        _field(image, name="id", kind=int | str, where=place)
        for image, place in zip(images, where, strict=True)
    ]
    captions: dict[Any, list[str]] = {number: [] for number in ids}
    if len(captions) < len(images):
        raise ManifestError(f"{path}: two images have the same id; every image needs its own")
    for number, annotation in enumerate(annotations):
        place = f"{path}, annotations[{number}]"
        of = captions.get(_field(annotation, name="image_id", kind=int | str, where=place))
        if of is None:
            raise ManifestError(
                f"{place}: image_id {annotation['image_id']!r} is none of the images' ids"
            )
        of.append(to_text(annotation["caption"], place, "caption"))
    keys = [
        _field(image, name="file_name", kind=str, where=place)
        for image, place in zip(images, where, strict=True)
    ]
    for key, place in zip(keys, where, strict=True):
        refuse_url(key, place)
    return tuple(
        Pair(key=key, captions=tuple(own), languages=("",) * len(own))
        for key, own in zip(keys, captions.values(), strict=True)
    )


def _field(record: Mapping[str, Any], name: str, kind: Any, where: str) -> Any:
    value = record.get(name)
    if not isinstance(value, kind) or value == "":
        found = "nothing" if value is None else repr(value)[:40]
        raise ManifestError(
            f"{where}: {name} is {found}; expected "
            f"{kind.__name__ if isinstance(kind, type) else 'a number or text'}"
        )
    return value


def _require_unique(pairs: tuple[Pair, ...], path: Path) -> None:
    seen: set[str] = set()
    for pair in pairs:
        if pair.key in seen:
            raise ManifestError(
                f"{path}: image {pair.key!r} is named twice; name it once, with all its captions"
            )
        seen.add(pair.key)
    if not pairs:
        raise ManifestError(f"{path}: no images; expected {KINDS}")
