"""Read the pair table of a store (keys, splits, labels, captions, languages), and check it."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from apecache.errors import DamagedError, one_line
from apecache.fingerprint import content_hash
from apecache.storage.files import Files
from apecache.store.equal import equal_captions
from apecache.store.layout import (
    CONTENT_COLUMN,
    PAIR_CHUNK_ROWS,
    PAIR_CODECS,
    PAIR_COLUMNS,
    PAIRS,
    SOURCE,
    ZARR,
)
from apecache.store.records import read_record


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Hold the columns of the pair table.

    Columns of images (keys, splits, labels) are [n_images]; columns of texts (captions, languages,
    image_rows) are [n_texts].
    """

    keys: NDArray[np.object_]
    splits: NDArray[np.object_]
    labels: NDArray[np.object_]
    captions: NDArray[np.object_]
    languages: NDArray[np.object_]
    image_rows: NDArray[np.int64]
    """Row of each caption's image."""
    digest: str

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def caption_ids(self) -> NDArray[np.int64]:
        """Return int64 [n_texts]: equal numbers for captions that are equal word for word."""
        return equal_captions(self.captions)

    def split_counts(self) -> dict[str, int]:
        """Return the images per split, in the order of first appearance.

        The empty name stands for images without a split.
        """
        return dict(Counter(self.splits.tolist()))


def read_table(files: Files) -> PairTable:
    """Read the pair table of one segment.

    Raises:
        DamagedError: An object of the table is missing, or is not what was written.
    """
    record = read_record(files, PAIRS)
    source = read_record(files, SOURCE)
    if record["digest"] != source["digest"]:
        raise DamagedError(
            f"{files.where(PAIRS)} and {SOURCE} are of different tables; restore the files"
        )
    objects = _read_objects(files, record["objects"])
    n_rows = {"image": source["n_images"], "text": source["n_texts"]}
    columns: dict[str, NDArray[Any]] = {}
    for name, dimension in PAIR_COLUMNS:
        folder = f"{ZARR}/pairs/{name}"
        columns[name] = _column(files, folder=folder, rows=n_rows[dimension], objects=objects)
    image_rows = np.asarray(columns.pop("text_image_row"), dtype=np.int64)
    # In a block that no table of the user's describes, a caption may have no image.
    first_row = -1 if source.get("view_only") is True else 0
    if len(image_rows) and not (
        image_rows.min() >= first_row and image_rows.max() < n_rows["image"]
    ):
        raise DamagedError(
            f"{files.where(PAIRS)}: captions of images that the table does not have; restore "
            "the files"
        )
    keys, splits, labels, captions, languages = (
        np.asarray(column, dtype=object) for column in columns.values()
    )
    return PairTable(
        keys=keys,
        splits=splits,
        labels=labels,
        captions=captions,
        languages=languages,
        image_rows=image_rows,
        digest=source["digest"],
    )


def read_contents(files: Files) -> list[str]:
    """Return the hash of each image that a block's table declares; empty where it declares none.

    Raises:
        DamagedError: An object of the table is missing, or is not what was written.
    """
    n_images = read_record(files, SOURCE)["n_images"]
    recorded = read_record(files, PAIRS)["objects"]
    folder = f"{ZARR}/pairs/{CONTENT_COLUMN}"
    if f"{folder}/zarr.json" not in recorded:
        return [""] * n_images
    column = read_column(files, folder=folder, rows=n_images, recorded=recorded)
    return [str(digest) for digest in column]


def read_column(
    files: Files,
    folder: str,
    rows: int,
    recorded: Mapping[str, Any],
) -> NDArray[Any]:
    """Read one column of a table.

    Args:
        files: The store.
        folder: Folder of the column.
        rows: Number of rows that it must have.
        recorded: Hashes of the table's objects, by name.

    Raises:
        DamagedError: An object of the column is missing, or is not what was written.
    """
    column_objects = {
        name: entry for name, entry in recorded.items() if name.startswith(f"{folder}/")
    }
    objects = _read_objects(files, column_objects)
    return _column(files, folder=folder, rows=rows, objects=objects)


def join_tables(tables: Sequence[PairTable], digest: str) -> PairTable:
    """Return one table with the rows of all segments, in order.

    Args:
        tables: The table of each segment.
        digest: Identity of the joined table.
    """
    # Each segment counts image rows from its own first image.
    first_rows = accumulate((len(table.keys) for table in tables[:-1]), initial=0)
    image_rows = [
        table.image_rows + first_row for table, first_row in zip(tables, first_rows, strict=True)
    ]
    return PairTable(
        keys=_joined(tables, "keys"),
        splits=_joined(tables, "splits"),
        labels=_joined(tables, "labels"),
        captions=_joined(tables, "captions"),
        languages=_joined(tables, "languages"),
        image_rows=np.concatenate(image_rows),
        digest=digest,
    )


def _joined(tables: Sequence[PairTable], column: str) -> NDArray[np.object_]:
    return np.concatenate([getattr(table, column) for table in tables])


def _read_objects(files: Files, recorded: Mapping[str, Any]) -> dict[str, bytes]:
    """Read the recorded objects; raises DamagedError unless they are what was recorded."""
    objects = dict[str, bytes]()
    reading = files.read_all(recorded)
    for name, entry in recorded.items():
        try:
            objects[name] = next(reading)
        except FileNotFoundError:
            raise DamagedError(
                f"{files.where(name)} differs from its record, or is missing"
            ) from None
        if content_hash(objects[name]) != entry["blake3"]:
            raise DamagedError(f"{files.where(name)} differs from its record, or is missing")
    return objects


def _column(files: Files, folder: str, rows: int, objects: Mapping[str, bytes]) -> NDArray[Any]:
    """Read one column, if its Zarr metadata is what apecache writes.

    Args:
        files: The store, for error messages.
        folder: Folder of the column.
        rows: Number of rows that it must have.
        objects: Objects of the pair table by name.
    """
    # Checked before Zarr reads it: metadata decides what Zarr allocates and which codecs it runs.
    try:
        described = json.loads(objects[f"{folder}/zarr.json"])
        (chunk,) = described["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in described["codecs"]]
        n_chunks = -(-rows // chunk)
        has_all_chunks = all(f"{folder}/c/{index}" in objects for index in range(n_chunks))
        if described["shape"] != [rows] or not 1 <= chunk <= PAIR_CHUNK_ROWS or not has_all_chunks:
            raise ValueError(f"it is not a column of {rows} rows")
        if codecs not in PAIR_CODECS:
            raise ValueError(f"codecs {codecs} are not those that apecache writes")
        buffers: dict[str, Buffer] = {}
        for object_name, data in objects.items():
            if object_name.startswith(f"{folder}/"):
                buffers[object_name[len(folder) + 1 :]] = cpu.Buffer.from_bytes(data)
        array: Any = zarr.open_array(MemoryStore(buffers), mode="r")
        values = array[:]
    except Exception as error:
        # The errors of Zarr, numpy and the codecs share no other base class.
        raise DamagedError(
            f"{files.where(folder)} cannot be read: {one_line(error)}; restore the files"
        ) from None
    # Zarr's strings are of a variable width, which numpy's own functions take less well.
    return np.asarray(values) if values.dtype == np.int64 else np.asarray(values, dtype=object)
