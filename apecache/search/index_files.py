"""Make, write and read the rows of an index, and its description.

INDEX/index.json                  what is in it, of which run, and how each set was built
INDEX/images.jsonl, texts.jsonl   keys and captions, in the order of the vectors; with the
                                  hash of each image's file
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from apecache.errors import RunError, nearest_sibling, raise_if_refused
from apecache.evaluate.embeddings import Embeddings, find_features
from apecache.runs.heads import TrainedSide
from apecache.runs.load import Run
from apecache.search.columns import ColumnValues
from apecache.search.faiss_index import KindReport
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable

FORMAT_VERSION = 1
Part = Literal["images", "texts"]
PARTS: tuple[Part, ...] = ("images", "texts")
Row = Mapping[str, str]


def index_rows(
    store: FeatureStore,
    run: Run,
    embedded: Embeddings,
    columns: ColumnValues,
) -> tuple[list[Row], list[Row]]:
    """Return the rows of images and captions.

    An image has its key, its first usable caption (empty without one) and the hash of its file. A
    caption has the key of its image and its words. Both have the image's values of `columns`.
    """
    pairs = store.pairs
    content = _content(store, run)
    owners = pairs.image_rows[embedded.text_rows]
    first_text: dict[int, int] = {}
    texts: list[Row] = []
    for text_row, image_row in zip(embedded.text_rows, owners, strict=True):
        first_text.setdefault(int(image_row), text_row)
        language = str(pairs.languages[text_row])
        texts.append(
            {
                "key": pairs.keys[image_row],
                "caption": pairs.captions[text_row],
                **_filled(_labels(pairs, image_row, columns), language=language),
            }
        )
    images: list[Row] = []
    for image_row in embedded.image_rows:
        caption = _caption(pairs, first_text.get(int(image_row)))
        images.append(
            {
                "key": pairs.keys[image_row],
                "caption": caption,
                "content": content[image_row],
                **_filled(_labels(pairs, image_row, columns)),
            }
        )
    return images, texts


def _labels(pairs: PairTable, image_row: int, columns: ColumnValues) -> dict[str, str]:
    """Return split and label of an image, and its values of further columns."""
    key = pairs.keys[image_row]
    return {
        "split": str(pairs.splits[image_row]),
        "label": str(pairs.labels[image_row]),
        **{column: values.get(key, "") for column, values in columns.items()},
    }


def _filled(fields: dict[str, str], **more: str) -> dict[str, str]:
    """Return the fields that are not empty: most tables have no label and one language."""
    return {name: value for name, value in {**fields, **more}.items() if value}


def _caption(pairs: PairTable, row: int | None) -> str:
    return "" if row is None else str(pairs.captions[row])


def _content(store: FeatureStore, run: Run) -> list[str]:
    """Return the hash of each image's file when the store's features were made.

    The hashes are empty where the store has none.
    """
    if isinstance(run.image, TrainedSide):
        return find_features(run.image, store, "image").content()
    # Any array knows the hashes of the files.
    arrays = store.arrays("image")
    return arrays[0].content() if arrays else [""] * len(store.pairs.keys)


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON, one a line."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def row_identity(row: Row) -> tuple[str, str]:
    """Return what makes a row the same: key and file of an image, key and words of a caption."""
    # An index without hashes of files has the first caption in their place.
    return row["key"], row.get("content", row["caption"])


def read_description(path: Path) -> dict[str, Any]:
    """Read `index.json`.

    Raises:
        RunError: no index, or one that is damaged or newer.
    """
    file = path / "index.json"
    if not file.is_file():
        raise_if_refused(file)
        raise RunError(
            f"{path} is not an index{nearest_sibling(path)} "
            f"(make one with: apecache index RUN --store STORE --out {path})"
        )
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        newer = description["format"] > FORMAT_VERSION
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError(f"{file} is damaged; build the index again") from None
    if newer:
        raise RunError(
            f"{file} has format {description['format']}; this apecache reads up to "
            f"{FORMAT_VERSION}: upgrade"
        )
    return description


def kind_of(description: Mapping[str, Any]) -> str:
    """Return the kind of an index."""
    # A description without a kind is that of an exact index.
    return str(description.get("kind", "flat"))


def read_report(description: Mapping[str, Any], part: Part) -> KindReport:
    """Return how the index of a modality was built; exact if the description does not say.

    Raises:
        RunError: the description is damaged.
    """
    exact = {"factory": "Flat", "trained_on": 0, "build_seconds": 0.0}
    try:
        report = KindReport(**description.get("built", {}).get(part, exact))
        if type(report.factory) is not str or type(report.trained_on) is not int:
            raise TypeError
        return report
    except (TypeError, AttributeError):
        raise RunError(
            f"index.json is damaged: it does not say how {part} were built; build the index again"
        ) from None


def read_rows(path: Path, part: Part) -> list[dict[str, str]]:
    """Read the rows of a modality, in the order of the vectors.

    Raises:
        RunError: they cannot be read.
    """
    try:
        # Only \n ends a line: captions may hold other characters that Python splits at.
        with (path / f"{part}.jsonl").open(encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line) for line in file]
        for row in rows:
            if not (isinstance(row["key"], str) and isinstance(row["caption"], str)):
                raise ValueError("a row without key and caption")
        return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise_if_refused(path / f"{part}.jsonl")
        raise RunError(
            f"{path / part}.jsonl cannot be read ({error}); build the index again"
        ) from None
