"""Say which features are imported, and how their rows are joined with a table."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath
from apecache.data.spec import OpenSpec
from apecache.encoders.spec import EncoderSpec

KeyMatch = Literal["exact", "name", "stem"]
StorageDtype = Literal["float16", "float32", "int8"]


@dataclass(frozen=True, kw_only=True)
class FeatureInput:
    """Name the features of one side."""

    features: AnyPath | NDArray[np.floating]
    """A file, a folder of files that belong together, or an array [rows, …]."""
    field: str | None = None
    """Name of the array or column in the file; None: the only one, or the one with a usual name."""
    keys: AnyPath | tuple[str, ...] | None = None
    """Keys of the rows: a list in a file, or texts; None: those in the file or beside it."""
    name: str | None = None
    """Name of the features in the store; None: the encoder's, the array's or the file's."""
    encoder: EncoderSpec | None = None
    """The encoder that made them, so that queries can be encoded live; None: not known."""
    views: bool = False
    """The dimension after the rows counts augmented views of each image, and not tokens."""


@dataclass(frozen=True, kw_only=True)
class ImportSpec:
    """Say what to import and how.

    `source` holds the features of both sides; `image` and `text` name them one by one.
    """

    source: AnyPath | None = None
    """A folder of clip-retrieval, an export of apecache, or a file with both sides."""
    image: FeatureInput | None = None
    text: FeatureInput | None = None
    image_rows: AnyPath | NDArray[np.integer] | None = None
    """The row of each text's image, [n_texts]: several texts may have one image."""
    by_row: bool = False
    """Join rows by their position, where there are no keys."""
    match_keys: KeyMatch = "exact"
    """How keys are compared: whole, by the file name, or by the file name without its ending."""
    storage_dtype: StorageDtype | None = None
    """None: float16 stays float16, all others become float32."""
    splits: OpenSpec | None = None
    """Where splits come from, if there is no table to say it."""
    max_bad: float = 0.01
    """Share of rows that may be missing or not finite."""
    shard_rows: int | None = None
    """Rows of one commit; None: about 8 MiB."""
    device: str = "auto"
    """Device of the encoders, which encode a few rows to compare them."""
    recheck: bool = False
    """Compare every committed shard with the source, and write damaged ones again."""
    single_writer: bool = False
    """Nobody else writes to the store."""


def array_name(text: str) -> str:
    """Return a name that is safe as a folder and as a Zarr group."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip(".-")[:100] or "features"
