"""Read which texts and images of a store belong together, beyond each image's own captions."""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apecache.errors import DataError, one_line
from apecache.evaluate.embeddings import Embeddings
from apecache.metrics.graded import GradedPairs
from apecache.store.equal import fold_caption
from apecache.store.reader import FeatureStore

COLUMNS = ("text", "image", "grade")


@dataclass(frozen=True, kw_only=True)
class RelevantPair:
    """Hold one line of a relevance file."""

    text: str
    """`KEY#N`, the N-th caption of an image, counted from 0; or the caption itself."""
    image: str
    """Key of an image."""
    grade: float = 1.0


def read_relevance(path: Path) -> list[RelevantPair]:
    """Read a table with the columns text, image and, if there are grades, grade.

    Args:
        path: `.tsv`, `.csv` or `.jsonl`.

    Raises:
        DataError: no such file, no pair, a column that is missing, or a grade that is not a number
            from 0.
    """
    try:
        rows = list(_rows(path))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {one_line(error)}; give a .tsv, .csv or .jsonl"
        ) from None
    if not rows:
        raise DataError(
            f"{path} has no pair; expected a .tsv, .csv or .jsonl with the columns text, image and "
            "(optional) grade"
        )
    pairs = []
    # A table has a header, so its first row is line 2.
    for number, row in enumerate(rows, 2 if path.suffix != ".jsonl" else 1):
        if not row.get("text") or not row.get("image"):
            raise DataError(
                f"{path}, line {number}: expected the columns text, image and (optional) grade, "
                f"found {', '.join(map(str, row)) or 'none'}"
            )
        pairs.append(
            RelevantPair(
                text=str(row["text"]),
                image=str(row["image"]),
                grade=_grade(row.get("grade"), f"{path}, line {number}"),
            )
        )
    return pairs


def graded_pairs(
    pairs: list[RelevantPair],
    store: FeatureStore,
    embedded: Embeddings,
) -> tuple[GradedPairs, int]:
    """Find the rows of the pairs among embedded images and texts.

    Args:
        pairs: what `read_relevance` returned.
        store: the store of the embeddings.
        embedded: images and texts of a split.

    Returns:
        The pairs, and how many lines name an image or a text that is not in the split.
    """
    image_of_key = {str(store.pairs.keys[row]): n for n, row in enumerate(embedded.image_rows)}
    texts_of = _texts_by_name(store, embedded)
    grades: dict[tuple[int, int], float] = {}
    n_unknown = 0
    for pair in pairs:
        image = image_of_key.get(pair.image)
        # As given first: a name `KEY#N` is not folded as captions are.
        texts = texts_of.get(pair.text) or texts_of.get(fold_caption(pair.text), [])
        if image is None or not texts:
            n_unknown += 1
            continue
        for text in texts:
            grades[text, image] = pair.grade
    listed = list(grades)
    graded = GradedPairs(
        texts=torch.tensor([text for text, _ in listed], dtype=torch.int64),
        images=torch.tensor([image for _, image in listed], dtype=torch.int64),
        grades=torch.tensor([grades[pair] for pair in listed], dtype=torch.float32),
    )
    return graded, n_unknown


def _texts_by_name(store: FeatureStore, embedded: Embeddings) -> dict[str, list[int]]:
    """Return the embedded texts under `KEY#N` and under their plain words."""
    pairs = store.pairs
    numbers: dict[int, int] = {}
    n_captions: dict[int, int] = defaultdict(int)
    # Captions are counted over the whole table, so that a name is the same in every split.
    for row, image_row in enumerate(pairs.image_rows.tolist()):
        numbers[row] = n_captions[image_row]
        n_captions[image_row] += 1
    names: dict[str, list[int]] = defaultdict(list)
    for position, row in enumerate(embedded.text_rows.tolist()):
        key = pairs.keys[pairs.image_rows[row]]
        names[f"{key}#{numbers[row]}"].append(position)
        names[fold_caption(str(pairs.captions[row]))].append(position)
    return names


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            for line in file:
                if line.strip():
                    yield _object(line)
            return
        yield from csv.DictReader(file, delimiter="," if path.suffix == ".csv" else "\t")


def _object(line: str) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"expected an object on each line, found {line.strip()[:40]}")
    return value


def _grade(value: object, line_name: str) -> float:
    # A table without grades lists right answers, all equally right.
    if value is None or value == "":
        return 1.0
    try:
        grade = float(str(value))
    except ValueError:
        grade = math.nan
    if not (math.isfinite(grade) and grade >= 0):
        raise DataError(f"{line_name}: grade {value!r}: expected a number from 0")
    return grade
