"""Join imported rows with a table by key, or make a table of what the source says."""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from apecache.data.pairs import Pair, PairSource
from apecache.data.spec import OpenSpec
from apecache.data.splits import resplit
from apecache.errors import DataError, counted
from apecache.fingerprint import content_hash, digest_strings
from apecache.store.import_sides import FeatureSide, Sides, Texts
from apecache.store.import_spec import ImportSpec, KeyMatch
from apecache.store.table import PairTable
from apecache.store.writer import PairColumns

RowMap = NDArray[np.int64]
"""For each row of the store, its row in the source; -1 where the source has none."""
NO_ROW = -1
REPEATED_KEY = "image rows of a repeated key"
REPEATED_CAPTION = "text rows of a repeated caption"


@dataclass(frozen=True, kw_only=True)
class ImportTable:
    """Hold the table of the store, and where its rows are in the source."""

    columns: PairColumns
    image_map: RowMap | None
    """[n_images]; None without image features."""
    text_map: RowMap | None
    """[n_texts]; None without text features."""
    has_captions: bool
    """Whether captions are known; else they are placeholders that name rows."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows of the source that are not imported, by reason."""


def columns_of(source: PairSource) -> PairColumns:
    """Return the table of a source, column by column."""
    return PairColumns(
        keys=source.keys,
        splits=[pair.split for pair in source],
        labels=[pair.label for pair in source],
        captions=source.captions,
        languages=source.languages,
        image_rows=source.image_rows,
        digest=source.digest,
        origin=source.origin,
    )


def columns_of_table(table: PairTable, origin: str) -> PairColumns:
    """Return the table of a store that exists."""
    return PairColumns(
        keys=table.keys.tolist(),
        splits=table.splits.tolist(),
        labels=table.labels.tolist(),
        captions=table.captions.tolist(),
        languages=table.languages.tolist(),
        image_rows=table.image_rows.tolist(),
        digest=table.digest,
        origin=origin,
    )


# --- with a table ---------------------------------------------------------------------------------


def join_with(columns: PairColumns, sides: Sides, spec: ImportSpec) -> ImportTable:
    """Find the row of each image and each text of a table in the features.

    Raises:
        DataError: Keys do not fit; or there are none, and rows are not asked for or not as many.
    """
    left_out: dict[str, int] = {}
    image = sides.get("image")
    text = sides.get("text")
    image_map = None
    if image is not None:
        # Images first: texts may name rows of images.
        image_map = _join_images(columns, image=image, spec=spec, left_out=left_out)
    text_map = None
    if text is not None:
        text_keys = _text_keys(columns, text, image)
        keyed_text = replace(text, keys=text_keys)
        text_map = _join_texts(columns, text=keyed_text, spec=spec, left_out=left_out)
    return ImportTable(
        columns=columns,
        image_map=image_map,
        text_map=text_map,
        has_captions=any(columns.captions),
        left_out=left_out,
    )


def _text_keys(columns: PairColumns, text: FeatureSide, image: FeatureSide | None) -> Texts | None:
    """Return the key of each text's image, also where texts name rows of images."""
    if text.image_rows is None:
        return text.keys
    keys = np.array(columns.keys, dtype=object)
    if image is not None and image.keys is not None:
        keys = image.keys
    if text.image_rows.min(initial=0) < 0 or text.image_rows.max(initial=0) >= len(keys):
        raise DataError(
            f"{text.origin}: rows of images up to {text.image_rows.max():,}, but there are "
            f"{counted(len(keys), 'image')}; rows are counted from 0"
        )
    return keys[text.image_rows]


def _join_images(
    columns: PairColumns,
    image: FeatureSide,
    spec: ImportSpec,
    left_out: dict[str, int],
) -> RowMap:
    n_images = len(columns.keys)
    if image.keys is None:
        _require_by_row(image, n_images, "images", columns, spec)
        return np.arange(n_images)
    shorten = key_form(spec.match_keys)
    source_rows = _row_by_key(image.keys, spec.match_keys, left_out, REPEATED_KEY)
    rows = (source_rows.get(shorten(key), NO_ROW) for key in columns.keys)
    joined_rows = np.fromiter(rows, np.int64, n_images)
    n_used = len(np.unique(joined_rows[joined_rows >= 0]))
    _require_match(image, columns, n_found=int((joined_rows >= 0).sum()), match=spec.match_keys)
    if n_used < len(source_rows):
        left_out["images that are not in the table"] = len(source_rows) - n_used
    return joined_rows


def _row_by_key(
    keys: Texts,
    match: KeyMatch,
    left_out: dict[str, int],
    reason: str,
) -> dict[str, int]:
    """Return the first row of each key."""
    shorten = key_form(match)
    rows: dict[str, int] = {}
    for row, key in enumerate(keys):
        form = shorten(key)
        first = rows.setdefault(form, row)
        # The same key again is a repeated image; another key of the same form is a mistake.
        if first != row:
            if keys[first] != key:
                raise DataError(
                    f"keys {keys[first]} and {key} are the same by --match-keys {match}; compare "
                    "whole keys with --match-keys exact"
                )
            left_out[reason] = left_out.get(reason, 0) + 1
    return rows


def key_form(match: KeyMatch) -> Callable[[str], str]:
    """Return the function that makes the compared form of a key."""

    def name_of(key: str) -> str:
        return key.replace("\\", "/").rpartition("/")[2]

    def stem_of(key: str) -> str:
        name = name_of(key)
        return name.rpartition(".")[0] or name

    match match:
        case "exact":
            return str
        case "name":
            return name_of
        case "stem":
            return stem_of


def _require_match(side: FeatureSide, columns: PairColumns, n_found: int, match: KeyMatch) -> None:
    """Refuse features of which none belongs to the table, and name what would make them fit."""
    if n_found or not columns.keys:
        return
    assert side.keys is not None
    # The message shows a key of each, and tries for the user what else would make them equal.
    hint = "compare an example of each, or join by position with --by-row"
    other_matches: tuple[KeyMatch, ...] = ("exact", "name", "stem")
    for other in other_matches:
        shorten = key_form(other)
        forms = {shorten(key) for key in side.keys}
        n_fitting = sum(shorten(key) in forms for key in columns.keys)
        if other != match and n_fitting:
            hint = f"{n_fitting:,} of them fit with --match-keys {other}"
            break
    raise DataError(
        f"{side.origin}: none of its keys ({side.keys[0]}, …) is in {columns.origin} "
        f"({columns.keys[0]}, …); {hint}"
    )


def _require_by_row(
    side: FeatureSide,
    n_expected: int,
    noun: str,
    columns: PairColumns,
    spec: ImportSpec,
) -> None:
    """Refuse rows without keys, unless rows are asked for and there are as many."""
    counts_text = f"{side.origin} has {side.n_rows:,} rows, {columns.origin} {n_expected:,} {noun}"
    if not spec.by_row:
        raise DataError(
            f"{side.origin} has no keys to join its rows with {columns.origin}; give them with "
            f"--{side.modality}-keys, or join by position with --by-row"
        )
    if side.n_rows != n_expected:
        other = ""
        if side.modality == "image" and side.n_rows == len(columns.captions):
            other = " (one row for each caption: give one for each image, or keys)"
        raise DataError(f"{counts_text}{other}; --by-row needs equal counts")


def _join_texts(
    columns: PairColumns,
    text: FeatureSide,
    spec: ImportSpec,
    left_out: dict[str, int],
) -> RowMap:
    """Find each caption of the table: by key and words, by key and order, by words, or by row."""
    n_texts = len(columns.captions)
    if text.keys is None and text.captions is None:
        _require_by_row(text, n_texts, "captions", columns, spec)
        return np.arange(n_texts)
    if text.keys is None:
        assert text.captions is not None
        first_rows = _row_by_key(
            text.captions, "exact", left_out, "text rows of a repeated caption"
        )
        rows = (first_rows.get(caption, NO_ROW) for caption in columns.captions)
        joined_rows = np.fromiter(rows, np.int64, n_texts)
    else:
        joined_rows = _join_keyed_texts(columns, text, spec.match_keys)
        _require_match(text, columns, n_found=int((joined_rows >= 0).sum()), match=spec.match_keys)
    # A caption of two images may use one row twice, so rows and not uses are counted.
    n_unused = text.n_rows - len(np.unique(joined_rows[joined_rows >= 0]))
    n_unused -= left_out.get(REPEATED_CAPTION, 0)
    if n_unused > 0:
        left_out["texts that are not in the table"] = n_unused
    return joined_rows


def _join_keyed_texts(columns: PairColumns, text: FeatureSide, match: KeyMatch) -> RowMap:
    """Find captions among the rows of their image: by their words, else by their order."""
    assert text.keys is not None
    shorten = key_form(match)
    rows_of_key: dict[str, list[int]] = defaultdict(list)
    for row, key in enumerate(text.keys):
        rows_of_key[shorten(key)].append(row)
    texts_of_image: dict[int, list[int]] = defaultdict(list)
    for text_row, image_row in enumerate(columns.image_rows):
        texts_of_image[image_row].append(text_row)
    joined_rows = np.full(len(columns.captions), NO_ROW, np.int64)
    for image_row, text_rows in texts_of_image.items():
        key = columns.keys[image_row]
        source_rows = rows_of_key.get(shorten(key), [])
        if text.captions is not None:
            # Each row is used once, so that a caption that an image has twice finds both.
            unused_rows = list(source_rows)
            for text_row in text_rows:
                caption = columns.captions[text_row]
                same = next((row for row in unused_rows if text.captions[row] == caption), None)
                if same is not None:
                    unused_rows.remove(same)
                    joined_rows[text_row] = same
        elif source_rows:
            if len(source_rows) != len(text_rows):
                raise DataError(
                    f"{text.origin}: image {key} has {counted(len(source_rows), 'row')} there and "
                    f"{counted(len(text_rows), 'caption')} in {columns.origin}; give the captions "
                    "as a column, so that each finds its row"
                )
            joined_rows[text_rows] = source_rows
    return joined_rows


# --- without a table ------------------------------------------------------------------------------


def make_table(sides: Sides, spec: ImportSpec) -> ImportTable:
    """Make the table of a store from the keys, captions and splits of the source.

    Raises:
        DataError: Nothing says which texts belong to which images, and rows are not asked for or
            not as many.
    """
    left_out: dict[str, int] = {}
    image = sides.get("image")
    text = sides.get("text")
    described = image or text
    assert described is not None
    if image is not None and text is not None:
        keys, image_map, text_owner = _pair_sides(image, text, spec, left_out)
    elif image is not None:
        keys, image_map = _image_keys(image, left_out)
        text_owner = _caption_owners(image)
    else:
        assert text is not None
        keys, text_owner = _text_owners_alone(text)
        image_map = None
    # Texts stand image by image, as in every table; the sort keeps their order within one.
    text_map = np.flatnonzero(text_owner >= 0)
    text_map = text_map[np.argsort(text_owner[text_map], kind="stable")]
    image_rows = text_owner[text_map]
    captioned = text or described
    captions = _captions(captioned, text_map)
    first_rows = _first_rows(image_map, text_map, image_rows, len(keys))
    columns = PairColumns(
        keys=keys,
        splits=_picked(described.splits, first_rows),
        labels=_picked(described.labels, first_rows),
        captions=captions,
        languages=_picked(captioned.languages, text_map),
        image_rows=image_rows.tolist(),
        digest="",
        origin=described.origin,
    )
    columns = _with_splits(columns, spec.splits)
    return ImportTable(
        columns=replace(columns, digest=table_digest(columns)),
        image_map=image_map,
        text_map=text_map if text is not None else None,
        has_captions=captioned.captions is not None,
        left_out=left_out,
    )


def _pair_sides(
    image: FeatureSide,
    text: FeatureSide,
    spec: ImportSpec,
    left_out: dict[str, int],
) -> tuple[list[str], RowMap, NDArray[np.int64]]:
    """Return the keys, the rows of the images, and the image of each text (-1: none)."""
    if text.image_rows is not None:
        if text.image_rows.min(initial=0) < 0 or text.image_rows.max(initial=0) >= image.n_rows:
            raise DataError(
                f"{text.origin}: rows of images up to {text.image_rows.max():,}, but "
                f"{image.origin} has {image.n_rows:,} rows; rows are counted from 0"
            )
        keys, image_map = _image_keys(image, left_out)
        return keys, image_map, _image_of_row(image)[text.image_rows]
    if image.keys is not None and text.keys is not None:
        keys, image_map = _image_keys(image, left_out)
        shorten = key_form(spec.match_keys)
        number = {shorten(key): row for row, key in enumerate(keys)}
        owners = (number.get(shorten(key), NO_ROW) for key in text.keys)
        owner = np.fromiter(owners, np.int64, text.n_rows)
        n_lost = int((owner < 0).sum())
        if n_lost == text.n_rows:
            raise DataError(
                f"none of the keys of {text.origin} ({text.keys[0]}, …) is in {image.origin} "
                f"({keys[0]}, …); compare file names only with --match-keys name"
            )
        if n_lost:
            left_out["texts without an image"] = n_lost
        return keys, image_map, owner
    if not (spec.by_row or (image.is_aligned and text.is_aligned)):
        raise DataError(
            "nothing says which texts belong to which images; give a table with --pairs and keys, "
            "the image of each text with --image-rows, or pair row with row with --by-row"
        )
    if image.n_rows != text.n_rows:
        raise DataError(
            f"{image.origin} has {image.n_rows:,} rows, {text.origin} {text.n_rows:,}; --by-row "
            "needs equal counts"
        )
    keyed = image if image.keys is not None else replace(image, keys=text.keys)
    keys, image_map = _image_keys(keyed, left_out)
    return keys, image_map, _image_of_row(keyed)


def _image_keys(image: FeatureSide, left_out: dict[str, int]) -> tuple[list[str], RowMap]:
    """Return the key of each image and its first row; rows without keys are named by number."""
    if image.keys is None:
        return list(map(str, range(image.n_rows))), np.arange(image.n_rows)
    rows = _row_by_key(image.keys, "exact", left_out, REPEATED_KEY)
    return list(rows), np.fromiter(rows.values(), np.int64, len(rows))


def _image_of_row(image: FeatureSide) -> NDArray[np.int64]:
    """Return the number of each row's image: rows of one key are one image."""
    if image.keys is None:
        return np.arange(image.n_rows)
    numbers: dict[str, int] = {}
    owners = [numbers.setdefault(key, len(numbers)) for key in image.keys]
    return np.array(owners, np.int64)


def _caption_owners(image: FeatureSide) -> NDArray[np.int64]:
    """Return the image of each caption that comes with images; none without captions."""
    if image.captions is None:
        return np.empty(0, np.int64)
    return _image_of_row(image)


def _text_owners_alone(text: FeatureSide) -> tuple[list[str], NDArray[np.int64]]:
    """Return keys and the image of each text, where there are no features of images."""
    if text.image_rows is not None:
        n_images = int(text.image_rows.max(initial=-1)) + 1
        return list(map(str, range(n_images))), text.image_rows
    if text.keys is None:
        return list(map(str, range(text.n_rows))), np.arange(text.n_rows)
    owner = _image_of_row(text)
    return list(dict.fromkeys(text.keys)), owner


def _captions(side: FeatureSide, rows: RowMap) -> list[str]:
    """Return captions; where they are not known, words that name the rows."""
    if side.captions is not None:
        captions: list[str] = side.captions[rows].tolist()
        return captions
    # Different ones: equal captions would be right answers for one another.
    return [f"text {row}" for row in rows.tolist()]


def _first_rows(
    image_map: RowMap | None,
    text_map: RowMap,
    image_rows: NDArray[np.int64],
    n_images: int,
) -> RowMap:
    """Return the row of the source that describes each image."""
    if image_map is not None:
        return image_map
    first = np.zeros(n_images, np.int64)
    # Backwards, so that the first text of each image is written last.
    first[image_rows[::-1]] = text_map[::-1]
    return first


def _picked(values: Texts | None, rows: RowMap) -> list[str]:
    if values is None:
        return [""] * len(rows)
    picked: list[str] = values[rows].tolist()
    return picked


def _with_splits(columns: PairColumns, spec: OpenSpec | None) -> PairColumns:
    """Assign splits by a file or by shares, if they are asked for."""
    if spec is None or not spec.resplits:
        return columns
    bare_pairs = tuple(Pair(key=key, captions=(), languages=()) for key in columns.keys)
    assigned = resplit(PairSource(bare_pairs, origin=columns.origin), spec)
    return replace(columns, splits=[pair.split for pair in assigned])


def table_digest(columns: PairColumns) -> str:
    """Return the identity of a table that was made from features."""
    text_columns = (
        columns.keys,
        columns.splits,
        columns.labels,
        columns.captions,
        columns.languages,
    )
    hashes = [_column_digest(column) for column in text_columns]
    image_rows = np.array(columns.image_rows, "<i8")
    return digest_strings([*hashes, content_hash(image_rows.tobytes())])


def _column_digest(values: list[str]) -> str:
    """Return a hash of texts: of their lengths and of all of them joined, in two passes."""
    lengths = np.fromiter(map(len, values), "<i8", len(values))
    return content_hash(lengths.tobytes()) + content_hash("".join(values))
