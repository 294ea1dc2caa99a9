"""Export a store as plain files: one .npz, or Parquet. Reading them needs no pickle."""

import zipfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import DataError, MissingExtraError
from apecache.fingerprint import Modality
from apecache.storage.replace import new_file, new_folder
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.store.table import stored_name

MAX_TEXT_BYTES = 4 << 30


def export_npz(store: FeatureStore, out: AnyPath) -> list[str]:
    """Write one file with every array of the store, one array in memory at a time.

    `image_key`, `image_split`, `image_label`, `image_column_NAME` (further columns, names
    percent-encoded), `text_caption` and `text_language` are fixed-width strings; `text_image_row`
    is the image of each caption; `image.NAME` and `text.NAME` are features [rows, dim], not
    normalized (NaN where `….ok` is False); where rows differ in their number of tokens, `….length`
    is that number.

    Returns:
        Names of the arrays.

    Raises:
        IncompleteError: Extraction has not finished.
        DamagedError: The store is damaged.
        DataError: Captions are too long for fixed-width strings.
    """
    require_type(store, FeatureStore, "store")
    names = []
    with (
        new_file(as_path(out, "out")) as scratch,
        zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for name, array in _npz_arrays(store):
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
            names.append(name)
    return names


def _npz_arrays(store: FeatureStore) -> Iterator[tuple[str, NDArray[Any]]]:
    pairs = store.pairs
    columns = {"image_key": pairs.keys, "image_split": pairs.splits, "image_label": pairs.labels}
    columns |= {stored_name(name): values for name, values in pairs.columns.items()}
    columns |= {"text_caption": pairs.captions, "text_language": pairs.languages}
    for name, values in columns.items():
        longest = max(map(len, values), default=0)
        # Every string takes 4 bytes for each character of the longest one.
        if longest * len(values) * 4 > MAX_TEXT_BYTES:
            raise DataError(
                f"{name}: strings of up to {longest:,} characters are too long for .npz; use "
                "--parquet"
            )
        yield name, values.astype(f"U{max(1, longest)}")
    yield "text_image_row", pairs.image_rows
    for array in store.arrays():
        yield f"{array.record.modality}.{array.name}", array.load()
        yield f"{array.record.modality}.{array.name}.ok", array.load_ok()
        lengths = array.load_lengths()
        if lengths is not None:
            yield f"{array.record.modality}.{array.name}.length", lengths


def export_parquet(store: FeatureStore, out: AnyPath) -> list[str]:
    """Write `out/images.parquet` and `out/texts.parquet`, one row per image and per caption.

    Features are columns of fixed-size lists, named as the arrays; null where a row has none.
    Further columns of the view are `column_NAME`.

    Returns:
        Names of the files.

    Raises:
        MissingExtraError: pyarrow is not installed.
        IncompleteError: Extraction has not finished.
        DamagedError: The store is damaged.
    """
    require_type(store, FeatureStore, "store")
    out = as_path(out, "out")
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
    pairs = store.pairs
    images: dict[str, Any] = {"key": pairs.keys, "split": pairs.splits, "label": pairs.labels}
    images |= {f"column_{name}": values for name, values in pairs.columns.items()}
    texts: dict[str, Any] = {
        "caption": pairs.captions,
        "language": pairs.languages,
        "image_row": pairs.image_rows,
    }
    tables: tuple[tuple[str, Modality, dict[str, Any]], ...] = (
        ("images", "image", images),
        ("texts", "text", texts),
    )
    with new_folder(out) as scratch:
        for file, modality, columns in tables:
            pair_columns = {name: pa.array(values.tolist()) for name, values in columns.items()}
            features = {array.name: _list_column(pa, array) for array in store.arrays(modality)}
            pq.write_table(pa.table({**pair_columns, **features}), scratch / f"{file}.parquet")
    return [f"{file}.parquet" for file, *_ in tables]


def _list_column(pa: ModuleType, array: FeatureArray) -> Any:
    values = pa.array(array.load().reshape(-1))
    missing = pa.array(~array.load_ok())
    return pa.FixedSizeListArray.from_arrays(values, array.dim, mask=missing)
