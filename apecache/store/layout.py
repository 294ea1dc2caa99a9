"""What lies where in a store, and the Zarr metadata of its arrays.

    STORE/README.md
    STORE/features.zarr/                      nothing but Zarr v3
        pairs/                                keys, splits, labels, captions, languages, text -> image row
        image/<name>/features, status         [rows, dim] float16 or float32; uint8 [rows]
        text/<name>/features, status          rows are captions
    STORE/records/source.json                 digest of the table: claims the store for it
    STORE/records/pairs.json                  hashes of the pair table's objects: the store exists
    STORE/records/<modality>/<name>/
        fingerprint.json                      what makes these features; layout; Zarr metadata
        commits/00000012.json                 one immutable record per shard
        quarantine/00000012.jsonl             rows that could not be encoded, and why
        seal.json                             written last

    STORE/segments/0001/                      rows that were appended: a store of its own, with the same layout

One chunk is one file is one commit unit, the shard. Missing chunks read as NaN, never as zeros.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from apecache.encoders.spec import EncoderSpec
from apecache.errors import StoreError
from apecache.fingerprint import Fingerprint, Json, Modality

FORMAT_VERSION = 1
ZARR = "features.zarr"
SOURCE, PAIRS = "records/source.json", "records/pairs.json"
SEGMENTS = "segments"
MISSING, OK, QUARANTINED = 0, 1, 2
MAX_SHARD_BYTES = 64 << 20
PAIR_CHUNK_ROWS = 65_536
SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class ArrayLayout:
    """Shape of one array and how its rows were batched; fixed when the array is created, and used by every resume."""

    rows: int
    dim: int
    dtype: str
    shard_rows: int
    batch_size: int
    threads: int

    @property
    def n_shards(self) -> int:
        return -(-self.rows // self.shard_rows)

    def shard(self, index: int) -> range:
        """Rows of one shard; the last may be shorter."""
        return range(index * self.shard_rows, min((index + 1) * self.shard_rows, self.rows))


@dataclass(frozen=True)
class ArrayRecord:
    """`fingerprint.json`: everything about an array that is fixed when it is created."""

    modality: Modality
    name: str
    spec: EncoderSpec
    fingerprint: Fingerprint
    layout: ArrayLayout
    metadata: Mapping[str, str]
    environment: Mapping[str, Json]

    @property
    def encoder(self) -> Fingerprint:
        """Identity of the encoder alone: what a head trained on these features must be used with."""
        return Fingerprint(self.fingerprint.fields["encoder"])

    def to_json(self) -> Json:
        return {
            "format": FORMAT_VERSION,
            "spec": asdict(self.spec),
            "digest": self.fingerprint.digest,
            "fields": self.fingerprint.fields,
            "layout": asdict(self.layout),
            "environment": self.environment,
            "metadata": self.metadata,
        }

    @staticmethod
    def from_json(modality: Modality, name: str, value: Any) -> "ArrayRecord":
        """Raises StoreError for another format or a damaged record."""
        require_format(value, f"{records_folder(modality, name)}/fingerprint.json")
        try:
            fingerprint = Fingerprint(value["fields"])
            spec, layout = EncoderSpec(**value["spec"]), ArrayLayout(**value["layout"])
            record = ArrayRecord(modality, name, spec, fingerprint, layout, value["metadata"], value["environment"])
            if fingerprint.digest != value["digest"]:
                raise ValueError("its digest does not fit its fields")
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(f"records of {modality}/{name} are damaged: {error}") from None
        return record


def require_format(value: Any, where: str) -> None:
    found = value.get("format") if isinstance(value, dict) else None
    if not isinstance(found, int):
        raise StoreError(f"{where} is not an apecache record")
    if found > FORMAT_VERSION:
        raise StoreError(f"{where} has format {found}; this apecache reads up to {FORMAT_VERSION}: upgrade apecache")


def records_folder(modality: str, name: str) -> str:
    return f"records/{modality}/{name}"


def array_folder(modality: str, name: str) -> str:
    return f"{ZARR}/{modality}/{name}"


def commit_name(modality: str, name: str, shard: int) -> str:
    return f"{records_folder(modality, name)}/commits/{shard:08d}.json"


def quarantine_name(modality: str, name: str, shard: int) -> str:
    return f"{records_folder(modality, name)}/quarantine/{shard:08d}.jsonl"


def chunk_name(modality: str, name: str, part: str, shard: int) -> str:
    suffix = ".0" if part == "features" else ""
    return f"{array_folder(modality, name)}/{part}/c.{shard}{suffix}"


def chunk_bytes(layout: ArrayLayout) -> dict[str, int]:
    """Size of one chunk file of each part, its crc32c included."""
    return {
        "features": layout.shard_rows * layout.dim * np.dtype(layout.dtype).itemsize + 4,
        "status": layout.shard_rows + 4,
    }


def with_metadata(record: ArrayRecord) -> ArrayRecord:
    """The record with Zarr's own metadata files of its array group, by path below the group.

    The group's attributes repeat the rest of the record: for people who open the store with plain Zarr, and so that a
    lost `fingerprint.json` can be made again.
    """
    memory = MemoryStore()
    described = {key: value for key, value in record.to_json().items() if key != "metadata"}
    layout, modality = record.layout, record.modality
    group = zarr.create_group(memory, zarr_format=3, attributes={"apecache": described})
    _create(group, "features", (layout.rows, layout.dim), (layout.shard_rows, layout.dim), layout.dtype, modality)
    _create(group, "status", (layout.rows,), (layout.shard_rows,), "uint8", modality)
    metadata = {key: _bytes(value).decode() for key, value in memory._store_dict.items()}
    return replace(record, metadata=metadata)


def described_record(modality: Modality, name: str, attributes: Mapping[str, Any]) -> ArrayRecord:
    """The record that a Zarr group's attributes repeat. Raises StoreError if they are not those of an array."""
    described = attributes.get("apecache")
    if not isinstance(described, dict):
        raise StoreError(f"{array_folder(modality, name)} has no attributes of apecache")
    return with_metadata(ArrayRecord.from_json(modality, name, {**described, "metadata": {}}))


def _create(group: Any, part: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str, modality: str) -> None:
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
        dimension_names=(modality, f"{part}_feature")[: len(shape)],
    )


def root_objects(version: str) -> dict[str, bytes]:
    """Metadata of the root and of the two modalities' groups, by path below the store."""
    memory = MemoryStore()
    root = zarr.create_group(memory, zarr_format=3, attributes={"apecache": version, "format": FORMAT_VERSION})
    root.create_group("image")
    root.create_group("text")
    return {f"{ZARR}/{key}": _bytes(value) for key, value in memory._store_dict.items()}


def pair_objects(columns: Mapping[str, tuple[str, list[str] | list[int]]]) -> dict[str, bytes]:
    """Objects of the group `pairs`: column name -> (dimension, values), zstd and crc32c, by path below the store."""
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
        array[:] = np.array([storable(v) for v in values], dtype=object) if strings else np.array(values)
    return {f"{ZARR}/{key}": _bytes(value) for key, value in memory._store_dict.items() if key.startswith("pairs/")}


def storable(text: str | int) -> str:
    """UTF-8 cannot hold lone surrogates; they become U+FFFD (their rows are quarantined)."""
    return SURROGATES.sub("\ufffd", str(text))


def _bytes(value: Any) -> bytes:
    raw: bytes = value.to_bytes()
    return raw


README = """This folder is a feature store written by apecache: plain Zarr v3 plus one JSON record per committed shard.

    import zarr
    root = zarr.open("features.zarr", mode="r")
    print(root.tree())
    features = root["image/NAME/features"][:]      # NaN: not there; status 1 ok, 2 quarantined, 0 missing
    captions = root["pairs/text_caption"][:]       # pairs/text_image_row: the image of each caption

    import xarray
    xarray.open_datatree("features.zarr", engine="zarr", consolidated=False)

`records/` holds what makes the features and the hashes of every object; `apecache info` and Zarr need nothing else.
"""
