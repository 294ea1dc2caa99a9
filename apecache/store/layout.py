"""Define the files of a store, and the Zarr metadata of its arrays.

    STORE/README.md
    STORE/features.zarr/                      nothing but Zarr v3
        pairs/                                keys, splits, labels, captions, languages
        image/<name>/features, status         [rows, dim] float16, float32 or int8; uint8 [rows]
        image/<name>/scale                    float32 [rows], beside int8: features are int8 * scale
        image/<name>/length                   uint16 [rows], where numbers of tokens differ
        text/<name>/…                         rows are captions
    STORE/records/source.json                 digest of the table: claims the store for it
    STORE/records/pairs.json                  hashes of the pair table's objects: the store exists
    STORE/records/segments/0001.json          which table was appended as segment 0001
    STORE/records/<modality>/<name>/
        fingerprint.json                      what makes these features; layout; Zarr metadata
        commits/00000012.json                 one immutable record per shard
        quarantine/00000012.jsonl             rows that could not be encoded, and why
        seal.json                             written last

    STORE/segments/0001/                      a later block of rows: a store of the same layout
    STORE/views/<id>/                         a table: for each of its rows, where the features lie
    STORE/records/views/<id>.json             the view exists; views/<id>/view.json is its copy
    STORE/records/stamps.bin                  size, time and hash of each image file: a cache

The store itself is the first block of rows, `segments/0001`, … are the later ones. A view lists its
blocks; `image_content_row` and `text_content_row` count rows through these blocks, and are -1 where
an input could not be read. A store without views is read as one table: that of its blocks.

Features are [rows, dim], [rows, tokens, dim], [rows, views, dim] or [rows, views, tokens, dim]; a
row with fewer tokens is padded with zeros. Beside int8 lies a scale for each vector of dim numbers.
One chunk is one file is one commit unit, the shard. Missing chunks read as NaN, never as zeros
(int8: their scales do).
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import StoreError, one_line
from apecache.fingerprint import Fingerprint, Json, Modality

FORMAT_VERSION = 1
"""Format of blocks and of their records."""
VIEW_FORMAT_VERSION = 2
"""Format of views, and of the records of blocks whose own table is not one of the user's."""
ZARR = "features.zarr"
SOURCE = "records/source.json"
PAIRS = "records/pairs.json"
SEGMENTS = "segments"
SEGMENT_RECORDS = "records/segments"
VIEWS = "views"
VIEW_RECORDS = "records/views"
STAMPS = "records/stamps.bin"
MISSING = 0
OK = 1
QUARANTINED = 2
DTYPES = ("float16", "float32", "int8")
MAX_SHARD_BYTES = 64 << 20
"""Largest shard that is written, unless one row is larger."""
MAX_CHUNK_BYTES = 1 << 31
"""Largest shard that a record may describe."""
PAIR_CHUNK_ROWS = 65_536
PAIR_COLUMNS = (
    ("image_key", "image"),
    ("image_split", "image"),
    ("image_label", "image"),
    ("text_caption", "text"),
    ("text_language", "text"),
    ("text_image_row", "text"),
)
"""Columns of the pair table, each with its dimension."""
CONTENT_COLUMN = "image_content"
"""Column of blocks whose table is not one of the user's: BLAKE3 of each image, where known."""
VIEW_COLUMNS = (
    *PAIR_COLUMNS,
    ("image_problem", "image"),
    ("image_content_row", "image"),
    ("text_content_row", "text"),
)
"""Columns of a view: those of a pair table, why an image has no features, and where they lie."""
FURTHER_COLUMN = "image_column_"
"""Begins the names of a view's further columns; the percent-encoded name of the column follows."""
PAIR_CODECS = (["vlen-utf8", "zstd", "crc32c"], ["bytes", "zstd", "crc32c"])
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Describe the shape of one array and how its rows are batched.

    It is fixed when the array is created, and every resume uses it.
    """

    rows: int
    dim: int
    dtype: str
    """Of the features as they are stored: float16, float32 or int8."""
    shard_rows: int
    """Rows of one shard; the last shard may have fewer."""
    batch_size: int
    threads: int
    views: int | None = None
    """Augmented views of each image; None for the image itself."""
    tokens: int | None = None
    """Positions of each row, of the longest one if ragged; None for pooled features."""
    ragged: bool = False
    """Whether rows differ in their number of tokens."""
    compiled: bool = False
    """Whether TorchInductor had compiled the model."""
    batch_tokens: int | None = None
    """Most tokens of a batch of captions, padding included; None: only `batch_size` limits it."""

    def to_json(self) -> Json:
        fields = asdict(self)
        # Left out where they say nothing: other records are the same as without the fields.
        if not self.compiled:
            del fields["compiled"]
        if self.batch_tokens is None:
            del fields["batch_tokens"]
        return fields

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Return a row's shape: (dim,), (tokens, dim), (views, dim) or (views, tokens, dim)."""
        return tuple(count for count in (self.views, self.tokens, self.dim) if count is not None)

    @property
    def row_bytes(self) -> int:
        """Return the bytes of a row's features, with their scales."""
        n_bytes = 0
        for part_name, (dtype, shape) in self.parts.items():
            if part_name in ("features", "scale"):
                n_bytes += math.prod(shape) * np.dtype(dtype).itemsize
        return n_bytes

    @property
    def scaled(self) -> bool:
        """Return whether features are integers with a scale for each vector (see `quantize`)."""
        return self.dtype == "int8"

    @property
    def read_dtype(self) -> str:
        """Return the dtype of features before they are written and after they are read."""
        return "float16" if self.scaled else self.dtype

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Return the Zarr arrays of this array: name -> (dtype, shape of a row)."""
        zarr_arrays: dict[str, tuple[str, tuple[int, ...]]] = {
            "features": (self.dtype, self.row_shape),
            "status": ("uint8", ()),
        }
        if self.scaled:
            zarr_arrays["scale"] = ("float32", self.row_shape[:-1])
        if self.ragged:
            zarr_arrays["length"] = ("uint16", ())
        return zarr_arrays

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard(self, index: int) -> range:
        """Return the rows of one shard; the last may be shorter."""
        first = index * self.shard_rows
        return range(first, min(first + self.shard_rows, self.rows))


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """Hold `fingerprint.json`: everything about an array that is fixed when it is created."""

    modality: Modality
    name: str
    spec: EncoderSpec
    fingerprint: Fingerprint
    layout: ArrayLayout
    metadata: Mapping[str, str]
    """Zarr's metadata files, by path below the array's group."""
    environment: Mapping[str, Json]
    table: str
    """Digest of the pair table that has the array's rows."""

    @property
    def encoder(self) -> Fingerprint:
        """Return the identity of the encoder that a head trained on these features needs."""
        return Fingerprint(fields=self.fingerprint.fields["encoder"])

    def to_json(self) -> Json:
        return {
            "format": FORMAT_VERSION,
            "spec": asdict(self.spec),
            "digest": self.fingerprint.digest,
            "fields": self.fingerprint.fields,
            "layout": self.layout.to_json(),
            "table": self.table,
            "environment": self.environment,
            "metadata": self.metadata,
        }

    @staticmethod
    def from_json(modality: Modality, name: str, value: Any) -> "ArrayRecord":
        """Parse a record; raises StoreError for another format or a damaged record."""
        require_format(value, f"{records_folder(modality, name)}/fingerprint.json")
        try:
            fingerprint = Fingerprint(fields=value["fields"])
            spec = spec_from_json(value["spec"])
            layout = layout_from_json(value["layout"])
            metadata = {str(path): str(text) for path, text in value["metadata"].items()}
            environment = dict(value["environment"])
            record = ArrayRecord(
                modality=modality,
                name=name,
                spec=spec,
                fingerprint=fingerprint,
                layout=layout,
                metadata=metadata,
                environment=environment,
                table=str(value["table"]),
            )
            fits = fingerprint.digest == value["digest"]
            if not fits or not isinstance(fingerprint.fields.get("encoder"), dict):
                raise ValueError("its digest does not fit its fields")
            # The names are paths to write below the group, so nothing else is accepted.
            group_files = {f"{part_name}/zarr.json" for part_name in layout.parts}
            if not set(record.metadata) <= {"zarr.json", *group_files}:
                raise ValueError("its metadata files are not those of an array")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"records of {modality}/{name} are damaged: {one_line(error)}"
            ) from None
        return record


def layout_from_json(value: Any) -> ArrayLayout:
    """Parse a layout.

    Raises:
        ValueError: No array can have this layout.
        TypeError: It has unknown fields, or lacks some.
    """
    layout = ArrayLayout(**value)
    positive_fields = (
        layout.dim,
        layout.shard_rows,
        layout.batch_size,
        layout.threads,
        layout.views,
        layout.tokens,
        layout.batch_tokens,
    )
    all_positive = all(
        type(count) is int and count >= 1 for count in positive_fields if count is not None
    )
    if (
        not all_positive
        or type(layout.rows) is not int
        or layout.rows < 0
        or not _are_bools(layout.ragged, layout.compiled)
    ):
        raise ValueError("a layout with counts that are none")
    if layout.ragged and (layout.tokens is None or layout.views is not None):
        raise ValueError("a ragged layout without tokens")
    if layout.dtype not in DTYPES or layout.row_bytes * layout.shard_rows > MAX_CHUNK_BYTES:
        raise ValueError(f"a layout of {layout.dtype}, {layout.shard_rows} x {layout.row_shape}")
    return layout


def _are_bools(*values: object) -> bool:
    return all(type(value) is bool for value in values)


def require_format(value: Any, where: str) -> None:
    """Raise StoreError unless a record has a format that this version reads."""
    format_version = value.get("format") if isinstance(value, dict) else None
    if not isinstance(format_version, int):
        raise StoreError(f"{where} is not an apecache record")
    if format_version > VIEW_FORMAT_VERSION:
        raise StoreError(
            f"{where} has format {format_version}; this apecache reads up to "
            f"{VIEW_FORMAT_VERSION}: upgrade apecache"
        )


def records_folder(modality: str, name: str) -> str:
    """Return the folder of an array's records, below the store."""
    return f"records/{modality}/{name}"


def array_folder(modality: str, name: str) -> str:
    """Return the folder of an array's Zarr group, below the store."""
    return f"{ZARR}/{modality}/{name}"


def commit_name(modality: str, name: str, shard: int) -> str:
    """Return the name of the record that commits a shard."""
    return f"{records_folder(modality, name)}/commits/{shard:08d}.json"


def quarantine_name(modality: str, name: str, shard: int) -> str:
    """Return the name of the list of a shard's quarantined rows."""
    return f"{records_folder(modality, name)}/quarantine/{shard:08d}.jsonl"


def chunk_name(array: ArrayRecord, part: str, shard: int) -> str:
    """Return the name of the chunk file that holds one part of a shard."""
    _, row_shape = array.layout.parts[part]
    folder = array_folder(array.modality, array.name)
    # Only rows are chunked: the chunk has the index 0 in every dimension of a row.
    return f"{folder}/{part}/c.{shard}{'.0' * len(row_shape)}"


def chunk_bytes(layout: ArrayLayout) -> dict[str, int]:
    """Return the bytes of one chunk file of each part, with its crc32c."""
    return {
        part_name: layout.shard_rows * math.prod(shape) * np.dtype(dtype).itemsize + 4
        for part_name, (dtype, shape) in layout.parts.items()
    }


def segment_record_name(segment: str) -> str:
    """Return the name of the record of an appended segment."""
    return f"{SEGMENT_RECORDS}/{segment}.json"


def view_folder(view: str) -> str:
    """Return the folder of a view's columns, below the store."""
    return f"{VIEWS}/{view}"


def view_record_name(view: str) -> str:
    """Return the name of the record that commits a view."""
    return f"{VIEW_RECORDS}/{view}.json"


def with_metadata(record: ArrayRecord) -> ArrayRecord:
    """Return the record with Zarr's metadata files of its array group.

    The group's attributes repeat the rest of the record: for people who open the store with plain
    Zarr, and so that a lost `fingerprint.json` can be written again.
    """
    # Zarr writes the metadata itself, into memory: it stays what Zarr expects.
    memory = MemoryStore()
    described = {key: value for key, value in record.to_json().items() if key != "metadata"}
    layout = record.layout
    modality = record.modality
    group = zarr.create_group(memory, zarr_format=3, attributes={"apecache": described})
    axes = ["feature"]
    if layout.tokens is not None:
        axes.insert(0, "token")
    if layout.views is not None:
        axes.insert(0, "view")
    for part_name, (dtype, row_shape) in layout.parts.items():
        # Scales name their dimensions as features do, so that xarray multiplies the two.
        prefix = "features" if part_name == "scale" else part_name
        row_dimensions = [f"{prefix}_{axis}" for axis in axes[: len(row_shape)]]
        _create(
            group,
            part_name=part_name,
            shape=(layout.rows, *row_shape),
            chunks=(layout.shard_rows, *row_shape),
            dtype=dtype,
            dimensions=(modality, *row_dimensions),
        )
    metadata = {key: _bytes(value).decode() for key, value in memory._store_dict.items()}
    return replace(record, metadata=metadata)


def described_record(modality: Modality, name: str, attributes: Mapping[str, Any]) -> ArrayRecord:
    """Return the record that a Zarr group's attributes repeat.

    Raises:
        StoreError: The attributes are not those of an array.
    """
    described = attributes.get("apecache")
    if not isinstance(described, dict):
        raise StoreError(f"{array_folder(modality, name)} has no attributes of apecache")
    return with_metadata(ArrayRecord.from_json(modality, name, {**described, "metadata": {}}))


def _create(
    group: Any,
    part_name: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
) -> None:
    floating = np.dtype(dtype).kind == "f"
    group.create_array(
        part_name,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        # A missing chunk reads as this value: NaN cannot be taken for features.
        fill_value=float("nan") if floating else 0,
        serializer=BytesCodec(endian="little") if np.dtype(dtype).itemsize > 1 else "auto",
        compressors=[Crc32cCodec()],
        filters=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimensions,
    )


def root_objects(version: str) -> dict[str, bytes]:
    """Return the metadata of the root and of both modalities' groups, by path below the store."""
    memory = MemoryStore()
    root = zarr.create_group(
        memory,
        zarr_format=3,
        attributes={"apecache": version, "format": FORMAT_VERSION},
    )
    root.create_group("image")
    root.create_group("text")
    return {f"{ZARR}/{key}": _bytes(value) for key, value in memory._store_dict.items()}


Columns = Mapping[str, tuple[str, "Sequence[str] | Sequence[int] | NDArray[Any]"]]
"""(dimension, values) by column name."""


def pair_objects(columns: Columns) -> dict[str, bytes]:
    """Return the objects of the group `pairs`, by path below the store.

    Args:
        columns: (dimension, values) by column name. They are stored with zstd and crc32c.
    """
    return table_objects(columns, f"{ZARR}/pairs", {})


def table_objects(
    columns: Columns,
    folder: str,
    attributes: Mapping[str, Json],
) -> dict[str, bytes]:
    """Return the objects of a Zarr group of columns, by path below the store.

    Args:
        columns: As `pair_objects` takes them.
        folder: Folder of the group.
        attributes: Attributes of the group.
    """
    memory = MemoryStore()
    group = zarr.create_group(memory, path="table", zarr_format=3, attributes=dict(attributes))
    for name, (dimension, values) in columns.items():
        strings = len(values) == 0 or isinstance(values[0], str)
        if isinstance(values, np.ndarray):
            strings = values.dtype == object
        array = group.create_array(
            name,
            shape=(len(values),),
            chunks=(max(1, min(len(values), PAIR_CHUNK_ROWS)),),
            dtype="string" if strings else "int64",
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=(dimension,),
            # Every chunk is written, also one of empty texts, so that a missing one is damage.
            config={"write_empty_chunks": True},
        )
        if strings:
            array[:] = np.array(_storable_column(values), dtype=object)
        else:
            array[:] = np.array(values)
    return {
        f"{folder}/{key.removeprefix('table/')}": _bytes(value)
        for key, value in memory._store_dict.items()
        if key.startswith("table/")
    }


def _storable_column(values: Sequence[Any] | NDArray[Any]) -> Sequence[Any] | NDArray[Any]:
    """Return `storable` texts; a search in each of a million takes seconds, so ASCII has none."""
    is_ascii = all(map(str.isascii, map(str, values)))
    return values if is_ascii else [storable(text) for text in values]


def storable(text: str | int) -> str:
    """Return a text with U+FFFD for lone surrogates, which UTF-8 cannot encode.

    Rows of such texts are quarantined.
    """
    return SURROGATES.sub("\ufffd", str(text))


def _bytes(value: Any) -> bytes:
    raw: bytes = value.to_bytes()
    return raw


# Stores keep the hash of this text: another one would make every store look damaged.
README = """This folder is a feature store written by apecache: plain Zarr v3 plus one JSON record per committed shard.

    import zarr
    root = zarr.open("features.zarr", mode="r")
    print(root.tree())
    features = root["image/NAME/features"][:]      # NaN: not there; status 1 ok, 2 quarantined, 0 missing
    captions = root["pairs/text_caption"][:]       # pairs/text_image_row: the image of each caption

    import xarray
    xarray.open_datatree("features.zarr", engine="zarr", consolidated=False)

`records/` holds what makes the features and the hashes of every object; `apecache info` and Zarr need nothing else.
"""  # noqa: E501
