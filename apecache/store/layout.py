"""What lies where in a store, and the Zarr metadata of its arrays.

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

    STORE/segments/0001/                      rows that were appended: a store of the same layout

Features are [rows, dim], [rows, tokens, dim], [rows, views, dim] or [rows, views, tokens, dim]; a
row with fewer tokens is padded with zeros. Beside int8 lies a scale for each vector of dim numbers.
One chunk is one file is one commit unit, the shard. Missing chunks read as NaN, never as zeros
(int8: their scales do).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import StoreError, one_line
from apecache.fingerprint import Fingerprint, Json, Modality

FORMAT_VERSION = 1
ZARR = "features.zarr"
SOURCE = "records/source.json"
PAIRS = "records/pairs.json"
SEGMENTS = "segments"
SEGMENT_RECORDS = "records/segments"
MISSING = 0
OK = 1
QUARANTINED = 2
DTYPES = ("float16", "float32", "int8")
MAX_SHARD_BYTES = 64 << 20
MAX_CHUNK_BYTES = 1 << 31
"""What we make of an array at most (unless one row is longer), and what we believe a record that we
read."""
PAIR_CHUNK_ROWS = 65_536
PAIR_COLUMNS = (
    ("image_key", "image"),
    ("image_split", "image"),
    ("image_label", "image"),
    ("text_caption", "text"),
    ("text_language", "text"),
    ("text_image_row", "text"),
)
"""Columns of the pair table, each with what its rows are."""
PAIR_CODECS = (["vlen-utf8", "zstd", "crc32c"], ["bytes", "zstd", "crc32c"])
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class ArrayLayout:
    """Shape of one array and how its rows were batched; fixed when the array is created, and used
    by every resume.

    `views`: augmentations of each image; `tokens`: positions of each row (of the longest, if the
    array is `ragged`). `compiled`: by a model that TorchInductor has compiled.
    """

    rows: int
    dim: int
    dtype: str
    shard_rows: int
    batch_size: int
    threads: int
    views: int | None = None
    tokens: int | None = None
    ragged: bool = False
    compiled: bool = False

    def to_json(self) -> Json:
        fields = asdict(self)
        return (
            fields
            if self.compiled
            else {name: value for name, value in fields.items() if name != "compiled"}
        )

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: (dim,), (tokens, dim), (views, dim) or (views, tokens, dim)."""
        return tuple(count for count in (self.views, self.tokens, self.dim) if count is not None)

    @property
    def row_bytes(self) -> int:
        """Of features, with their scales."""
        wanted = (self.parts[part] for part in ("features", "scale") if part in self.parts)
        return sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in wanted)

    @property
    def scaled(self) -> bool:
        """Whether features are integers, with a scale for each vector (see `store.quantise`)."""
        return self.dtype == "int8"

    @property
    def read_dtype(self) -> str:
        """What features are before they are written, and when they have been read."""
        return "float16" if self.scaled else self.dtype

    @property
    def parts(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Zarr arrays beside each other: name -> (dtype, shape of a row)."""
        parts: dict[str, tuple[str, tuple[int, ...]]] = {
            "features": (self.dtype, self.row_shape),
            "status": ("uint8", ()),
        }
        parts |= {"scale": ("float32", self.row_shape[:-1])} if self.scaled else {}
        return {**parts, "length": ("uint16", ())} if self.ragged else parts

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard(self, index: int) -> range:
        """Rows of one shard; the last may be shorter."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))


@dataclass(frozen=True, kw_only=True)
class ArrayRecord:
    """`fingerprint.json`: everything about an array that is fixed when it is created. `table`:
    digest of the pair table that its rows are those of."""

    modality: Modality
    name: str
    spec: EncoderSpec
    fingerprint: Fingerprint
    layout: ArrayLayout
    metadata: Mapping[str, str]
    environment: Mapping[str, Json]
    table: str

    @property
    def encoder(self) -> Fingerprint:
        """Identity of the encoder alone: what a head trained on these features must be used
        with."""
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
        """Raises StoreError for another format or a damaged record."""
        require_format(value, f"{records_folder(modality, name)}/fingerprint.json")
        try:
            fingerprint = Fingerprint(fields=value["fields"])
            spec = spec_from_json(value["spec"])
            layout = layout_from_json(value["layout"])
            about = (
                {str(k): str(v) for k, v in value["metadata"].items()},
                dict(value["environment"]),
            )
            metadata, environment = about
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
            if fingerprint.digest != value["digest"] or not isinstance(
                fingerprint.fields.get("encoder"),
                dict,
            ):
                raise ValueError("its digest does not fit its fields")
            if not set(record.metadata) <= {
                "zarr.json",
                *(f"{part}/zarr.json" for part in layout.parts),
            }:
                raise ValueError("its metadata files are not those of an array")
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise StoreError(
                f"records of {modality}/{name} are damaged: {one_line(error)}"
            ) from None
        return record


def layout_from_json(value: Any) -> ArrayLayout:
    """Raises ValueError for a layout that no array can have, TypeError for strange fields."""
    layout = ArrayLayout(**value)
    counts = (
        layout.dim,
        layout.shard_rows,
        layout.batch_size,
        layout.threads,
        layout.views,
        layout.tokens,
    )
    whole = all(type(count) is int and count >= 1 for count in counts if count is not None)
    if (
        not whole
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
    found = value.get("format") if isinstance(value, dict) else None
    if not isinstance(found, int):
        raise StoreError(f"{where} is not an apecache record")
    if found > FORMAT_VERSION:
        raise StoreError(
            f"{where} has format {found}; this apecache reads up to {FORMAT_VERSION}: upgrade "
            "apecache"
        )


def records_folder(modality: str, name: str) -> str:
    return f"records/{modality}/{name}"


def array_folder(modality: str, name: str) -> str:
    return f"{ZARR}/{modality}/{name}"


def commit_name(modality: str, name: str, shard: int) -> str:
    return f"{records_folder(modality, name)}/commits/{shard:08d}.json"


def quarantine_name(modality: str, name: str, shard: int) -> str:
    return f"{records_folder(modality, name)}/quarantine/{shard:08d}.jsonl"


def chunk_name(array: ArrayRecord, part: str, shard: int) -> str:
    _, row_shape = array.layout.parts[part]
    return f"{array_folder(array.modality, array.name)}/{part}/c.{shard}{'.0' * len(row_shape)}"


def chunk_bytes(layout: ArrayLayout) -> dict[str, int]:
    """Size of one chunk file of each part, its crc32c included."""
    return {
        part: layout.shard_rows * math.prod(shape) * np.dtype(dtype).itemsize + 4
        for part, (dtype, shape) in layout.parts.items()
    }


def segment_record_name(segment: str) -> str:
    return f"{SEGMENT_RECORDS}/{segment}.json"


def with_metadata(record: ArrayRecord) -> ArrayRecord:
    """The record with Zarr's own metadata files of its array group, by path below the group.

    The group's attributes repeat the rest of the record: for people who open the store with plain
    Zarr, and so that a lost `fingerprint.json` can be made again.
    """
    memory = MemoryStore()
    described = {key: value for key, value in record.to_json().items() if key != "metadata"}
    layout = record.layout
    modality = record.modality
    group = zarr.create_group(memory, zarr_format=3, attributes={"apecache": described})
    axes = [
        axis
        for axis, count in (("view", layout.views), ("token", layout.tokens))
        if count is not None
    ]
    for part, (dtype, row_shape) in layout.parts.items():
        whose = (
            "features" if part == "scale" else part
        )  # the same dimensions, so that their product is one
        dimensions = (modality, *(f"{whose}_{axis}" for axis in (*axes, "feature")))[
            : 1 + len(row_shape)
        ]
        _create(
            group,
            part=part,
            shape=(layout.rows, *row_shape),
            chunks=(layout.shard_rows, *row_shape),
            dtype=dtype,
            dimensions=dimensions,
        )
    metadata = {key: _bytes(value).decode() for key, value in memory._store_dict.items()}
    return replace(record, metadata=metadata)


def described_record(modality: Modality, name: str, attributes: Mapping[str, Any]) -> ArrayRecord:
    """The record that a Zarr group's attributes repeat. Raises StoreError if they are not those of
    an array."""
    described = attributes.get("apecache")
    if not isinstance(described, dict):
        raise StoreError(f"{array_folder(modality, name)} has no attributes of apecache")
    return with_metadata(ArrayRecord.from_json(modality, name, {**described, "metadata": {}}))


def _create(
    group: Any,
    part: str,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: str,
    dimensions: tuple[str, ...],
) -> None:
    floating = np.dtype(dtype).kind == "f"
    group.create_array(
        part,
        shape=shape,
        chunks=chunks,
        dtype=dtype,
        fill_value=float("nan") if floating else 0,
        serializer=BytesCodec(endian="little") if np.dtype(dtype).itemsize > 1 else "auto",
        compressors=[Crc32cCodec()],
        filters=None,
        chunk_key_encoding={"name": "default", "separator": "."},
        dimension_names=dimensions,
    )


def root_objects(version: str) -> dict[str, bytes]:
    """Metadata of the root and of the two modalities' groups, by path below the store."""
    memory = MemoryStore()
    root = zarr.create_group(
        memory,
        zarr_format=3,
        attributes={"apecache": version, "format": FORMAT_VERSION},
    )
    root.create_group("image")
    root.create_group("text")
    return {f"{ZARR}/{key}": _bytes(value) for key, value in memory._store_dict.items()}


def pair_objects(columns: Mapping[str, tuple[str, list[str] | list[int]]]) -> dict[str, bytes]:
    """Objects of the group `pairs`: column name -> (dimension, values), zstd and crc32c, by path
    below the store."""
    memory = MemoryStore()
    group = zarr.create_group(memory, path="pairs", zarr_format=3)
    for name, (dimension, values) in columns.items():
        strings = not values or isinstance(values[0], str)
        array = group.create_array(
            name,
            shape=(len(values),),
            chunks=(max(1, min(len(values), PAIR_CHUNK_ROWS)),),
            dtype="string" if strings else "int64",
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            dimension_names=(dimension,),
            config={"write_empty_chunks": True},
        )
        array[:] = (
            np.array([storable(v) for v in values], dtype=object) if strings else np.array(values)
        )
    return {
        f"{ZARR}/{key}": _bytes(value)
        for key, value in memory._store_dict.items()
        if key.startswith("pairs/")
    }


def storable(text: str | int) -> str:
    """UTF-8 cannot hold lone surrogates; they become U+FFFD (their rows are quarantined)."""
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
