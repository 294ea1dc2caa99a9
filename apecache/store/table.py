"""The pair table of a store: keys, splits, labels, captions and languages, checked before they are
believed."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from apecache.errors import DamagedError, one_line
from apecache.fingerprint import content_hash
from apecache.storage.files import Files
from apecache.store.equal import equal_captions
from apecache.store.layout import PAIR_CHUNK_ROWS, PAIR_CODECS, PAIR_COLUMNS, PAIRS, SOURCE, ZARR
from apecache.store.records import read_record


@dataclass(frozen=True, kw_only=True)
class PairTable:
    """Columns of the pair table. Images [n_images]: keys, splits, labels; texts [n_texts]:
    captions, languages, image_rows (the row of each caption's image)."""

    keys: NDArray[np.object_]
    splits: NDArray[np.object_]
    labels: NDArray[np.object_]
    captions: NDArray[np.object_]
    languages: NDArray[np.object_]
    image_rows: NDArray[np.int64]
    digest: str

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    @cached_property
    def caption_ids(self) -> NDArray[np.int64]:
        """int64 [n_texts]: equal numbers for captions that are equal word for word."""
        return equal_captions(self.captions)

    def split_counts(self) -> dict[str, int]:
        """Images per split, in the order of first appearance; the empty name means no split was
        given."""
        return dict(Counter(self.splits.tolist()))


def read_table(files: Files) -> PairTable:
    """Raises DamagedError if an object of the table is not what was written, or not what a table is
    made of."""
    record = read_record(files, PAIRS)
    source = read_record(files, SOURCE)
    if record["digest"] != source["digest"]:
        raise DamagedError(
            f"{files.where(PAIRS)} and {SOURCE} are of different tables; restore the files"
        )
    objects = _read_objects(files, record["objects"])
    n_rows = {"image": source["n_images"], "text": source["n_texts"]}
    columns = {
        name: _column(files, name=name, rows=n_rows[dimension], objects=objects)
        for name, dimension in PAIR_COLUMNS
    }
    image_rows = np.asarray(columns.pop("text_image_row"), dtype=np.int64)
    if len(image_rows) and not (image_rows.min() >= 0 and image_rows.max() < n_rows["image"]):
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


def _read_objects(files: Files, recorded: Mapping[str, Any]) -> dict[str, bytes]:
    """By name. Raises DamagedError unless they are what was recorded."""
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


def _column(files: Files, name: str, rows: int, objects: Mapping[str, bytes]) -> NDArray[Any]:
    """One column, after a look at its description: what Zarr would allocate and run must be what we
    write."""
    folder = f"{ZARR}/pairs/{name}"
    try:
        described = json.loads(objects[f"{folder}/zarr.json"])
        (chunk,) = described["chunk_grid"]["configuration"]["chunk_shape"]
        codecs = [codec["name"] for codec in described["codecs"]]
        n_chunks = -(-rows // chunk)
        whole = all(f"{folder}/c/{index}" in objects for index in range(n_chunks))
        if described["shape"] != [rows] or not 1 <= chunk <= PAIR_CHUNK_ROWS or not whole:
            raise ValueError(f"it is not a column of {rows} rows")
        if codecs not in PAIR_CODECS:
            raise ValueError(f"codecs {codecs} are not those that apecache writes")
        own = {
            name[len(folder) + 1 :]: data
            for name, data in objects.items()
            if name.startswith(f"{folder}/")
        }
        array: Any = zarr.open_array(
            MemoryStore({key: cpu.Buffer.from_bytes(own[key]) for key in own}),
            mode="r",
        )
        values = array[:]
    except (
        Exception
    ) as error:  # what zarr, numpy and the codecs raise over strange metadata shares no base class
        raise DamagedError(
            f"{files.where(folder)} cannot be read: {one_line(error)}; restore the files"
        ) from None
    return np.asarray(values)
