"""Add images to a store, and delete images from it: small edits that make a new view."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apecache.arguments import AnyPath, as_place
from apecache.data.augment import views_from_json
from apecache.data.media import media_below
from apecache.data.pairs import NO_SPLIT, Pair, PairSource
from apecache.data.spec import spec_of_options
from apecache.errors import DataError, OptionError, nearest
from apecache.extraction.kept_columns import further_columns
from apecache.extraction.report import ExtractionProgress, ExtractReport
from apecache.extraction.run import extract
from apecache.extraction.spec import ExtractSpec
from apecache.fingerprint import canonical_json
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable
from apecache.store.view_edits import delete_rows
from apecache.store.views import ViewRecord

WHERE = ("key", "split", "label")
"""Columns of every view that rows are chosen by."""


def add_images(
    store: AnyPath,
    images: Iterable[AnyPath],
    captions: Sequence[str] = (),
    split: str = "",
    label: str = "",
    columns: Mapping[str, str] | None = None,
    root: AnyPath | None = None,
    device: str = "auto",
    progress: ExtractionProgress = lambda *_: None,
) -> list[ExtractReport]:
    """Add images to the newest view of a store, and encode them with all of its encoders.

    Args:
        store: Folder or URL of the store.
        images: Image files below `root`.
        captions: Captions of each of these images; may be empty.
        split: Split of the images; empty: as the rule of `apecache split` says, if there is one.
        label: Label of the images.
        columns: Value of further columns of the view by name; the images have none in others.
        root: Folder that keys are relative to; None for the one that the store has recorded.
        device: Where the encoders run.
        progress: As `extract` takes it.

    Returns:
        What each pass over the images did: one for each type of stored features.

    Raises:
        DataError: An image is not below `root`, or the store has its key already.
        OptionError: The recorded folder does not exist any more, and no other is given; or the view
            has no such column.
    """
    store_place = as_place(store, "store")
    opened = FeatureStore.open(store_place)
    folder = Path(str(root if root is not None else opened.source["root"]))
    if not folder.is_dir():
        raise OptionError(f"{folder} is not a folder; give the folder of the images as --root")
    keys = [_key_below(Path(str(image)), folder) for image in images]
    row_of_key = opened.pairs.row_of_key
    for key in keys:
        if key in row_of_key:
            raise DataError(
                f"{store_place} has {key} already; after a change of it: apecache extract"
            )
    further = further_columns(opened.pairs)
    for name, value in (columns or {}).items():
        if name not in further:
            available = ", ".join(further) or "none"
            raise OptionError(
                f"{store_place} holds no column {name!r}; found: {available}"
                f"{nearest(name, list(further))}; apecache extract --column keeps one of the table"
            )
        further[name] |= dict.fromkeys(keys, value)
    languages = ("",) * len(captions)
    added = [
        Pair(key=key, captions=tuple(captions), languages=languages, split=split, label=label)
        for key in dict.fromkeys(keys)
    ]
    pairs = pairs_of(opened.pairs)
    if opened.view is not None and opened.view.record.splits and not split:
        # Without splits, extraction gives these images theirs again, and new ones by the rule.
        pairs = [replace(pair, split=NO_SPLIT) for pair in pairs]
    options = opened.source.get("options", {})
    source = PairSource(
        (*pairs, *added),
        origin=str(opened.source["origin"]),
        media=media_below(folder),
        pixels=spec_of_options(options).pixels,
        options=options,
        columns=further,
    )
    specs = recorded_specs(opened, device)
    return [extract(source, store_place, spec, progress) for spec in specs]


def _key_below(image: Path, root: Path) -> str:
    """Return the key of an image file: its path below the root."""
    if not image.is_file():
        raise DataError(f"{image}: no such image file")
    base = os.path.realpath(root)
    path = os.path.realpath(image)
    if os.path.commonpath([base, path]) != base:
        raise DataError(f"{image} is not below {root}; copy it there, or give another --root")
    return Path(path).relative_to(base).as_posix()


def pairs_of(table: PairTable) -> list[Pair]:
    """Return the pairs of a table, image by image."""
    captions: list[list[str]] = [[] for _ in table.keys]
    languages: list[list[str]] = [[] for _ in table.keys]
    for text_row, image_row in enumerate(table.image_rows.tolist()):
        captions[image_row].append(str(table.captions[text_row]))
        languages[image_row].append(str(table.languages[text_row]))
    pairs: list[Pair] = []
    for row, key in enumerate(table.keys):
        pair = Pair(
            key=str(key),
            captions=tuple(captions[row]),
            languages=tuple(languages[row]),
            split=str(table.splits[row]),
            label=str(table.labels[row]),
        )
        pairs.append(pair)
    return pairs


def recorded_specs(opened: FeatureStore, device: str) -> list[ExtractSpec]:
    """Return how the features of a store were made: one spec for each way of storing them."""
    specs: dict[bytes, ExtractSpec] = {}
    for array in opened.arrays():
        views = array.record.fingerprint.fields.get("views")
        storage_dtype: Any = array.record.layout.dtype
        identity = canonical_json([storage_dtype, views])
        spec = specs.setdefault(
            identity,
            ExtractSpec(
                storage_dtype=storage_dtype,
                views=None if views is None else views_from_json(views),
                add=True,
                max_bad=1.0,
                device=device,
            ),
        )
        if array.record.modality == "image":
            specs[identity] = replace(spec, image=(*spec.images, array.record.spec))
        else:
            specs[identity] = replace(spec, text=(*spec.texts, array.record.spec))
    return list(specs.values())


def delete_images(
    store: AnyPath,
    keys: Sequence[str] = (),
    where: Sequence[tuple[str, str]] = (),
) -> ViewRecord:
    """Leave images, with their captions, out of a new view of a store; their features stay.

    Args:
        store: Folder or URL of the store.
        keys: Keys of images.
        where: (column, value) pairs; a column is key, split, label, or a further column of the
            view. Images that have any of these values are left out.

    Raises:
        OptionError: There is no such column.
        DataError: A key is not in the store; or no image is left out, or all are.
    """
    store_place = as_place(store, "store")
    files = open_files(store_place)
    opened = FeatureStore.at(files)
    for key in keys:
        if key not in opened.pairs.row_of_key:
            some_keys = [str(stored_key) for stored_key in opened.pairs.keys[:10_000]]
            raise DataError(f"{store_place} has no image {key!r}{nearest(key, some_keys)}")
    known = (*WHERE, *opened.pairs.columns)
    for column, _ in where:
        if column not in known:
            raise OptionError(
                f"--where {column}=…: expected one of {', '.join(known)}{nearest(column, known)}; "
                "apecache extract --column keeps further columns of the table"
            )

    def keep(table: PairTable) -> Any:
        columns = {"key": table.keys, "split": table.splits, "label": table.labels}
        columns |= table.columns
        deleted = np.isin(table.keys.astype(str), np.array(keys, dtype=str))
        for column, value in where:
            deleted |= columns[column] == value
        return ~deleted

    return delete_rows(files, keep)
