"""Read the pair table of a store (keys, splits, labels, captions, languages), and check it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any
from urllib.parse import quote

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
    FURTHER_COLUMN,
    PAIR_CHUNK_ROWS,
    PAIR_CODECS,
    PAIR_COLUMNS,
    PAIRS,
    SOURCE,
    ZARR,
    storable,
)
from apecache.store.records import read_record

COLUMN_OF_FIELD = {
    "keys": "image_key",
    "splits": "image_split",
    "labels": "image_label",
    "captions": "text_caption",
    "languages": "text_language",
    "image_rows": "text_image_row",
}
"""Column of each field of a table."""


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
    columns: Mapping[str, NDArray[np.object_]] = field(default_factory=dict)
    """Further columns of the user's table by name, each [n_images]."""

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def caption_ids(self) -> NDArray[np.int64]:
        """Return int64 [n_texts]: equal numbers for captions that are equal word for word."""
        return equal_captions(self.captions)

    def value_of_key(self, column: str) -> dict[str, str]:
        """Return the value of each image in a further column, by key; empty where it has none."""
        return dict(zip(self.keys.tolist(), self.columns[column].tolist(), strict=True))

    def split_counts(self) -> dict[str, int]:
        """Return the images per split, in the order of first appearance.

        The empty name stands for images without a split.
        """
        return dict(Counter(self.splits.tolist()))


class LazyColumns(Mapping[str, "NDArray[np.object_]"]):
    """Read a further column when it is first asked for.

    Args:
        names: Names of the columns.
        read: Returns a column by its name in the store, or raises DamagedError.
    """

    def __init__(self, names: Sequence[str], read: Callable[[str], NDArray[Any]]) -> None:
        self._names = tuple(names)
        self._read = read
        self._known: dict[str, NDArray[np.object_]] = {}

    def __getitem__(self, name: str) -> NDArray[np.object_]:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(stored_name(name))
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def stored_name(column: str) -> str:
    """Return the name that a further column has in a store."""
    return FURTHER_COLUMN + quote(column, safe="")


class LazyPairTable(PairTable):
    """Read a column when it is first asked for: ten million pairs take gigabytes as strings.

    Args:
        read: Returns a column by its name, or raises DamagedError.
        digest: Identity of the table.
        columns: Names of further columns.
    """

    def __init__(
        self,
        read: Callable[[str], NDArray[Any]],
        digest: str,
        columns: Sequence[str] = (),
    ) -> None:
        # The dataclass is frozen.
        vars(self)["_read"] = read
        vars(self)["digest"] = digest
        vars(self)["columns"] = LazyColumns(columns, read)

    def __getattr__(self, name: str) -> NDArray[Any]:
        # Only called for what is not there yet.
        if name not in COLUMN_OF_FIELD:
            raise AttributeError(name)
        vars(self)[name] = vars(self)["_read"](COLUMN_OF_FIELD[name])
        column: NDArray[Any] = vars(self)[name]
        return column

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {name: getattr(self, name) for name in COLUMN_OF_FIELD}
        further = {"digest": self.digest, "columns": dict(self.columns)}
        return _eager_table, ({**fields, **further},)


def _eager_table(fields: Mapping[str, Any]) -> PairTable:
    return PairTable(**fields)


def with_columns(table: PairTable, **changed: Any) -> PairTable:
    """Return a table with some of its columns, or its digest, changed."""
    fields = {name: getattr(table, name) for name in COLUMN_OF_FIELD}
    return PairTable(**{**fields, "digest": table.digest, "columns": table.columns, **changed})


def string_column(values: Iterable[str]) -> NDArray[np.object_]:
    """Return texts as a column of a table, which UTF-8 can encode."""
    storable_values = [storable(value) for value in values]
    column = np.empty(len(storable_values), dtype=object)
    column[:] = storable_values
    return column


def read_table(files: Files) -> PairTable:
    """Open the pair table of one block; its columns are read when they are asked for.

    Reading a column raises DamagedError if an object of it is missing, or is not what was written.

    Raises:
        DamagedError: A record of the table is missing or damaged.
    """
    record = read_record(files, PAIRS)
    source = read_record(files, SOURCE)
    if record["digest"] != source["digest"]:
        raise DamagedError(
            f"{files.where(PAIRS)} and {SOURCE} are of different tables; restore the files"
        )
    # Only chunks are large. Metadata is checked at once, also that of columns nobody asks for.
    metadata = {
        name: entry for name, entry in record["objects"].items() if name.endswith("zarr.json")
    }
    _read_objects(files, metadata)
    n_rows = {"image": source["n_images"], "text": source["n_texts"]}
    dimensions = dict(PAIR_COLUMNS)
    # In a block that no table of the user's describes, a caption may have no image.
    first_row = -1 if source.get("view_only") is True else 0

    def read(name: str) -> NDArray[Any]:
        column = read_column(
            files,
            folder=f"{ZARR}/pairs/{name}",
            rows=n_rows[dimensions[name]],
            recorded=record["objects"],
        )
        if name == "text_image_row":
            return checked_image_rows(column, files.where(PAIRS), first_row, n_rows["image"])
        return column

    return LazyPairTable(read, source["digest"])


def checked_image_rows(
    column: NDArray[Any],
    where: str,
    first_row: int,
    n_images: int,
) -> NDArray[np.int64]:
    """Return the image row of each caption; raises DamagedError if there are no such images."""
    image_rows = np.asarray(column, dtype=np.int64)
    if len(image_rows) and not (image_rows.min() >= first_row and image_rows.max() < n_images):
        raise DamagedError(
            f"{where}: captions of images that the table does not have; restore the files"
        )
    return image_rows


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


def join_tables(
    tables: Sequence[PairTable],
    digest: str,
    n_images: Sequence[int] | None = None,
) -> PairTable:
    """Return one table with the rows of all blocks, in order.

    Args:
        tables: The table of each block.
        digest: Identity of the joined table.
        n_images: Images of each table; None to count them.
    """

    def read(column: str) -> NDArray[Any]:
        (name,) = (name for name, stored in COLUMN_OF_FIELD.items() if stored == column)
        if name != "image_rows":
            return np.concatenate([getattr(table, name) for table in tables])
        image_counts = [len(table.keys) for table in tables] if n_images is None else n_images
        # Each block counts image rows from its own first image.
        first_rows = accumulate(image_counts[:-1], initial=0)
        image_rows = [
            table.image_rows + first_row
            for table, first_row in zip(tables, first_rows, strict=True)
        ]
        return np.concatenate(image_rows)

    return LazyPairTable(read, digest)


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
