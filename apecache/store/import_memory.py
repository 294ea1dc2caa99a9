"""Make a store of features in memory, for `FeatureStore.from_arrays`."""

import atexit
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import require_type
from apecache.data.media import Media, NoMedia
from apecache.data.pairs import PairSource
from apecache.errors import OptionError
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.store.import_arrays import PlannedArray, SegmentRows, import_arrays
from apecache.store.import_identity import digest_source, unknown_encoder
from apecache.store.import_sides import Sides, open_sides
from apecache.store.import_spec import FeatureInput, ImportSpec
from apecache.store.import_table import columns_of, join_with, make_table
from apecache.store.writer import create_store

Arrays = tuple[NDArray[np.floating] | None, NDArray[np.floating] | None]


def temporary_folder() -> Path:
    """Make a folder that is removed when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="apecache-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def store_arrays(
    files: Files,
    arrays: Arrays,
    pairs: PairSource | NDArray[np.integer] | None,
    names: tuple[str, str],
) -> None:
    """Write arrays of images and texts, and their table, into a store.

    Raises:
        OptionError: An argument of another type, or no array.
        DataError, MismatchError: As `FeatureStore.from_arrays` does.
    """
    require_type(pairs, (PairSource, np.ndarray), "pairs", optional=True)
    image_rows = pairs if isinstance(pairs, np.ndarray) else None
    inputs: dict[Modality, FeatureInput] = {}
    modalities: tuple[Modality, Modality] = ("image", "text")
    for modality, array, name in zip(modalities, arrays, names, strict=True):
        require_type(array, np.ndarray, modality, optional=True)
        if array is not None:
            inputs[modality] = FeatureInput(features=array, name=name)
    if not inputs:
        raise OptionError("image and text are both None; give at least one array [rows, dim]")
    # Rows that cannot be used are quarantined, and it is the caller's choice to have some.
    spec = ImportSpec(
        image=inputs.get("image"),
        text=inputs.get("text"),
        image_rows=image_rows,
        by_row=True,
        max_bad=1.0,
    )
    sides: Sides = open_sides(spec)
    media: Media = NoMedia()
    if isinstance(pairs, PairSource):
        table = join_with(columns_of(pairs), sides, spec)
        media = pairs.media
    else:
        table = make_table(sides, spec)
    create_store(files, pairs=table.columns, root=media.place, version=version("apecache"))
    # A new store has one segment, with all rows.
    n_rows = {"image": len(table.columns.keys), "text": len(table.columns.captions)}
    segments = {
        side: [SegmentRows(files=files, table=table.columns.digest, rows=range(n_rows[side]))]
        for side in sides
    }
    planned: list[PlannedArray] = []
    for side, opened_side in sides.items():
        (named,) = opened_side.arrays
        array_plan = PlannedArray(
            modality=side,
            named=named,
            encoder=unknown_encoder(named, side),
            source_digest=digest_source((), named.rows),
        )
        planned.append(array_plan)
    import_arrays(
        planned,
        segments=segments,
        table=table,
        spec=spec,
        progress=lambda _: None,
    )
