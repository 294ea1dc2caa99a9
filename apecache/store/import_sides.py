"""Find the features of each side in what the user named, with their keys and captions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import as_path
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, counted, nearest
from apecache.fingerprint import Modality
from apecache.store.feature_files.arrow_file import open_arrow
from apecache.store.feature_files.embedding_folder import (
    EXPORT_IMAGES,
    EXPORT_TEXTS,
    is_clip_retrieval,
    is_parquet_export,
    open_clip_retrieval,
)
from apecache.store.feature_files.open_file import open_features, read_keys
from apecache.store.feature_files.opened import Column, FeatureFile, fold_name
from apecache.store.feature_files.rows import ArrayRows, FeatureRows, shape_text
from apecache.store.import_spec import FeatureInput, ImportSpec, array_name

Texts = NDArray[Any]
"""Texts of type str, one a row."""
KEY_NAMES = (
    "image_key",
    "key",
    "image_path",
    "filename",
    "file_name",
    "filepath",
    "path",
    "image",
    "img",
    "image_id",
    "id",
    "url",
)
"""Columns that name the image of a row, in the order in which they are looked for."""
IMAGE_KEY_NAMES: tuple[str, ...] = (*KEY_NAMES, *(f"{name}s" for name in KEY_NAMES))
TEXT_KEY_NAMES: tuple[str, ...] = ("text_key", "text_keys", *IMAGE_KEY_NAMES)
CAPTION_NAMES = ("text_caption", "caption", "captions", "title", "sentence", "text", "texts")
LANGUAGE_NAMES = ("text_language", "language", "lang", "languages")
IMAGE_ROW_NAMES = (
    "text_image_row",
    "image_row",
    "image_rows",
    "image_index",
    "image_indices",
    "image_idx",
    "img_idx",
    "txt2img",
    "text2image",
)
SPLIT_NAMES = ("image_split", "split", "splits")
LABEL_NAMES = ("image_label", "label", "labels")
SIDE_WORDS: dict[Modality, str] = {
    "image": r"(image|img|vision|visual|video|audio|picture|photo)s?",
    "text": r"(text|txt|caption|sentence|title|language)s?",
}
FEATURE_WORDS = r"(emb|embed|embedding|feat|feature|vec|vector)s?"
GENERIC = re.compile(rf"({FEATURE_WORDS}|x|data|arr0|array|values)(0|1)?")
"""Names of arrays that say nothing about their side, without separators."""


@dataclass(frozen=True, kw_only=True)
class NamedRows:
    """Hold one array of features and its name in the store."""

    name: str
    rows: FeatureRows
    encoder: EncoderSpec | None
    views: bool


@dataclass(frozen=True, kw_only=True)
class FeatureSide:
    """Hold the features of one side, and what is known about their rows."""

    modality: Modality
    arrays: tuple[NamedRows, ...]
    origin: str
    """How the user named them."""
    paths: tuple[Path, ...] = ()
    """Files that hold them; none for arrays in memory."""
    keys: Texts | None = None
    """Keys of the rows: of the images, or of the images of the texts."""
    captions: Texts | None = None
    languages: Texts | None = None
    image_rows: NDArray[np.int64] | None = None
    """Of texts: the row of each one's image."""
    splits: Texts | None = None
    labels: Texts | None = None
    is_aligned: bool = False
    """Whether row i of both sides belongs together by the layout of the source."""

    @property
    def n_rows(self) -> int:
        return self.arrays[0].rows.n_rows


Sides = dict[Modality, FeatureSide]


def open_sides(spec: ImportSpec) -> Sides:
    """Open the features of each side.

    Raises:
        OptionError: Nothing is named, or one side twice.
        DataError: A file cannot be read, or does not have the features.
    """
    if spec.source is None and spec.image is None and spec.text is None:
        raise OptionError(
            "nothing to import: give a source of both sides, or the features of one with --image "
            "or --text"
        )
    sides: Sides = {}
    if spec.source is not None:
        if spec.image is not None or spec.text is not None:
            raise OptionError(
                f"{spec.source} holds both sides; leave --image and --text out, or leave it out"
            )
        sides = _open_both(as_path(spec.source, "source"))
    if spec.image is not None:
        sides["image"] = _open_side(spec.image, "image")
    if spec.text is not None:
        sides["text"] = _open_side(spec.text, "text")
    if spec.image_rows is not None:
        if "text" not in sides:
            raise OptionError("--image-rows is about texts; give their features with --text")
        image_rows = _read_image_rows(spec.image_rows, sides["text"])
        # Rows say which image a text belongs to, so keys are not needed any more.
        sides["text"] = replace(sides["text"], image_rows=image_rows, keys=None)
    return sides


def _open_both(path: Path) -> Sides:
    """Open a source that holds the features of both sides."""
    if path.is_dir() and is_clip_retrieval(path):
        return _open_embedding_folder(path)
    if path.is_dir() and is_parquet_export(path):
        image = open_arrow(path / EXPORT_IMAGES)
        text = open_arrow(path / EXPORT_TEXTS)
        sides: Sides = {}
        # An export of a store with one side has no features of the other.
        if image.features:
            sides["image"] = _side(image, list(image.features), "image", None)
        if text.features:
            sides["text"] = _side(text, list(text.features), "text", None)
        return sides
    opened = open_features(path)
    fields = {side: _fields_of(opened, side) for side in SIDE_WORDS}
    # One side in a file is enough: the other may come with --image or --text.
    named = {side: names for side, names in fields.items() if names}
    if not named:
        raise DataError(
            f"{path} has {_listed(opened)}; say of which side they are with --modality image or "
            "--modality text"
        )
    sides = {side: _side(opened, names, side, None) for side, names in named.items()}
    # A row of a table is one record, so its features belong together.
    is_record = opened.paths[0].suffix.lower() in (".parquet", ".arrow", ".feather")
    return {side: replace(opened_side, is_aligned=is_record) for side, opened_side in sides.items()}


def _open_embedding_folder(path: Path) -> Sides:
    """Open a folder of clip-retrieval: rows of all its files belong together."""
    folder = open_clip_retrieval(path)
    sides: Sides = {}
    for side, opened in (("image", folder.image), ("text", folder.text)):
        if opened is None:
            continue
        columns = {} if folder.metadata is None else folder.metadata.columns
        with_metadata = replace(opened, columns=columns)
        modality: Modality = "image" if side == "image" else "text"
        opened_side = _side(with_metadata, list(opened.features), modality, None)
        # Metadata that name neither image nor caption cannot pair the rows.
        if columns and opened_side.keys is None and opened_side.captions is None:
            raise DataError(
                f"{path}: its metadata does not have a row for each of the "
                f"{counted(opened_side.n_rows, side)}; copy the folder again"
            )
        sides[modality] = replace(opened_side, is_aligned=True)
    return sides


def _open_side(side_input: FeatureInput, side: Modality) -> FeatureSide:
    """Open the features of one side that the user named."""
    if isinstance(side_input.features, np.ndarray):
        rows = ArrayRows(values=side_input.features, stored=side_input.features.dtype, origin=side)
        named = NamedRows(
            name=array_name(side_input.name or _encoder_slug(side_input) or side),
            rows=rows,
            encoder=side_input.encoder,
            views=side_input.views,
        )
        opened_side = FeatureSide(modality=side, arrays=(named,), origin=f"{side} array")
    else:
        opened = open_features(as_path(side_input.features, side))
        opened_side = _side(opened, [_one_field(opened, side_input, side)], side, side_input)
    # Before keys are read: their number is compared with that of the rows.
    _require_rows(opened_side)
    if side_input.keys is None:
        return opened_side
    keys = side_input.keys
    texts = read_keys(as_path(keys, "keys")) if not isinstance(keys, tuple) else _texts(keys)
    if len(texts) != opened_side.n_rows:
        raise DataError(
            f"{len(texts):,} keys for {opened_side.n_rows:,} rows of {opened_side.origin}; "
            f"expected one for each row (--{side}-keys)"
        )
    return replace(opened_side, keys=texts)


def _side(
    opened: FeatureFile,
    fields: Sequence[str],
    side: Modality,
    side_input: FeatureInput | None,
) -> FeatureSide:
    """Return a side with the columns that have a value for each of its rows."""
    arrays: list[NamedRows] = []
    for field in fields:
        named = NamedRows(
            name=_name_of(opened, field, side_input, side),
            rows=opened.features[field],
            encoder=None if side_input is None else side_input.encoder,
            views=side_input is not None and side_input.views,
        )
        arrays.append(named)
    n_rows = arrays[0].rows.n_rows
    is_text = side == "text"
    # Rows of images say more than keys do: an export has both, and its keys are of images.
    image_rows = opened.column(IMAGE_ROW_NAMES, n_rows) if is_text else None
    # A column of this name that holds texts is one of keys or paths.
    if image_rows is not None and image_rows.dtype.kind not in "iu":
        image_rows = None
    key_names = TEXT_KEY_NAMES if is_text else IMAGE_KEY_NAMES
    keys = None if image_rows is not None else opened.column(key_names, n_rows)
    return FeatureSide(
        modality=side,
        arrays=tuple(arrays),
        origin=opened.origin,
        paths=opened.paths,
        keys=_optional_texts(keys),
        captions=_optional_texts(opened.column(CAPTION_NAMES, n_rows)),
        languages=_optional_texts(opened.column(LANGUAGE_NAMES, n_rows)),
        image_rows=None if image_rows is None else image_rows.astype(np.int64),
        splits=_optional_texts(opened.column(SPLIT_NAMES, n_rows)),
        labels=_optional_texts(opened.column(LABEL_NAMES, n_rows)),
    )


def _fields_of(opened: FeatureFile, side: Modality) -> list[str]:
    """Return the arrays of a file whose names say that they are of one side.

    `image.NAME` is how `apecache export` names arrays; there may be several of them.
    """
    # An export may hold several encoders' features of one side; other files hold one.
    exported = [name for name in opened.features if name.startswith(f"{side}.")]
    if exported:
        return exported
    words = re.compile(rf"({SIDE_WORDS[side]})({FEATURE_WORDS})?")
    return [name for name in opened.features if words.fullmatch(fold_name(name))][:1]


def _one_field(opened: FeatureFile, side_input: FeatureInput, side: Modality) -> str:
    """Return the array that is meant for a side."""
    names = list(opened.features)
    if side_input.field is not None:
        if side_input.field not in names:
            raise DataError(
                f"{opened.origin} has no array {side_input.field!r}, only {_listed(opened)}"
                f"{nearest(side_input.field, names)}"
            )
        return side_input.field
    if len(names) == 1:
        return names[0]
    candidates = _fields_of(opened, side)
    # No name says a side: names such as `features` suit both.
    if not candidates:
        candidates = [name for name in names if GENERIC.fullmatch(fold_name(name))]
    if len(candidates) != 1:
        raise DataError(f"{opened.origin} has {_listed(opened)}; choose one with --{side}-field")
    return candidates[0]


def _listed(opened: FeatureFile) -> str:
    """List the arrays of a file with their shapes."""
    shapes = [
        f"{name} ({shape_text((rows.n_rows, *rows.row_shape))})"
        for name, rows in list(opened.features.items())[:8]
    ]
    return f"the arrays {', '.join(shapes)}" if shapes else "no array of features [rows, dim]"


def _name_of(
    opened: FeatureFile,
    field: str,
    side_input: FeatureInput | None,
    side: Modality,
) -> str:
    """Return the name of an array in the store."""
    if side_input is not None and side_input.name is not None:
        return array_name(side_input.name)
    if side_input is not None and side_input.encoder is not None:
        return side_input.encoder.slug
    if field.startswith(f"{side}."):
        return array_name(field.removeprefix(f"{side}."))
    # A name such as `features` says nothing, so the array is called as its file.
    if GENERIC.fullmatch(fold_name(field)):
        origin = Path(opened.origin)
        return array_name(origin.stem if origin.suffix else origin.name)
    # Parts such as img_emb_0 are one array.
    return array_name(re.sub(r"[_-]?\d+$", "", field) or field)


def _encoder_slug(side_input: FeatureInput) -> str | None:
    return None if side_input.encoder is None else side_input.encoder.slug


def _require_rows(side: FeatureSide) -> None:
    for named in side.arrays:
        shape = named.rows.row_shape
        limit = 3 if named.views else 2
        if not named.rows.n_rows or not 1 <= len(shape) <= limit or 0 in shape:
            raise DataError(
                f"{side.origin}: {shape_text((named.rows.n_rows, *shape))} is not an array of "
                "features; expected rows x dim, rows x tokens x dim, or with --image-views or "
                "--text-views rows x views x dim"
            )
        if named.views and len(shape) == 1:
            raise DataError(f"{side.origin}: rows of one vector have no views; leave --views out")


def _read_image_rows(side_input: Any, text: FeatureSide) -> NDArray[np.int64]:
    if isinstance(side_input, np.ndarray):
        values = side_input
    else:
        path = as_path(side_input, "image_rows")
        values = _integers(path)
    if values.ndim != 1 or values.dtype.kind not in "iu" or len(values) != text.n_rows:
        raise DataError(
            f"--image-rows: expected {text.n_rows:,} whole numbers, one for each text; found "
            f"{values.dtype} of {shape_text(values.shape)}"
        )
    return values.astype(np.int64)


def _integers(path: Path) -> Column:
    """Read a `.npy` of whole numbers, or a text file with one a line."""
    if path.suffix.lower() == ".npy":
        numbers: Column = np.load(path, allow_pickle=False)
        return numbers
    keys = read_keys(path)
    try:
        return np.array([int(key) for key in keys], dtype=np.int64)
    except ValueError:
        raise DataError(f"{path}: expected one whole number a line") from None


def _optional_texts(column: Column | None) -> Texts | None:
    return None if column is None else _texts(column.tolist())


def _texts(values: Sequence[object]) -> Texts:
    texts = np.empty(len(values), dtype=object)
    texts[:] = [str(value) for value in values]
    return texts
