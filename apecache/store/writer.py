"""Writing features: whole shards, committed one by one, by as many processes as like to.

Order of a commit (each step durable before the next): chunk files, quarantine list, read-back, record put if absent.
A shard exists when its record does. There is no cursor: resuming is listing the records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from apecache.errors import DamagedError, MismatchError, StoreError
from apecache.fingerprint import Json, canonical_json, content_hash, describe_difference
from apecache.store.commit import CommitRecord, ObjectRecord, parse_record, seal_record
from apecache.store.files import Buffer, LocalFiles
from apecache.store.layout import (
    OK,
    PAIRS,
    QUARANTINED,
    README,
    SOURCE,
    ArrayLayout,
    ArrayRecord,
    array_folder,
    chunk_name,
    commit_name,
    pair_objects,
    quarantine_name,
    records_folder,
    root_objects,
)


@dataclass(frozen=True)
class PairColumns:
    """The pair table as columns. Images: keys, splits, labels. Texts: captions, languages, image_rows."""

    keys: list[str]
    splits: list[str]
    labels: list[str]
    captions: list[str]
    languages: list[str]
    image_rows: list[int]
    digest: str
    origin: str


@dataclass(frozen=True)
class QuarantinedRow:
    """`row` counts from the start of the array."""

    row: int
    key: str
    reason: str
    detail: str


def create_store(files: LocalFiles, pairs: PairColumns, root: str, version: str) -> None:
    """Make the store for a table, or finish making it, or find that it is there.

    Raises:
        MismatchError: the store belongs to another table.
        StoreError: the folder holds something else.
    """
    _refuse_foreign(files)
    source = {"digest": pairs.digest, "n_images": len(pairs.keys), "n_texts": len(pairs.captions)}
    files.create(SOURCE, seal_record({**source, "origin": pairs.origin, "root": root}))
    _require_same_source(parse_record(files.read(SOURCE), SOURCE), source, files)
    if files.exists(PAIRS):
        return
    columns: dict[str, tuple[str, list[str] | list[int]]] = {
        "image_key": ("image", pairs.keys),
        "image_split": ("image", pairs.splits),
        "image_label": ("image", pairs.labels),
        "text_caption": ("text", pairs.captions),
        "text_language": ("text", pairs.languages),
        "text_image_row": ("text", pairs.image_rows),
    }
    objects = {**root_objects(version), **pair_objects(columns)}
    for name, data in objects.items():
        files.write(name, data)
    files.write("README.md", README.encode())
    hashes: Json = {name: {"bytes": len(data), "blake3": content_hash(data)} for name, data in objects.items()}
    files.create(PAIRS, seal_record({"digest": pairs.digest, "objects": hashes}))


def _refuse_foreign(files: LocalFiles) -> None:
    if files.root.exists() and not files.root.is_dir():
        raise StoreError(f"{files.root} is a file; give a folder as --store")
    if files.list("") and not (files.root / "records").is_dir():
        raise StoreError(f"{files.root} is not empty and not a store; choose another --store")


def _require_same_source(found: Mapping[str, Json], wanted: Mapping[str, Json], files: LocalFiles) -> None:
    differences = [(key, wanted[key], found.get(key)) for key in sorted(wanted) if wanted[key] != found.get(key)]
    if differences:
        raise MismatchError(
            f"{files.root} was made from another table ({found.get('origin')}): {describe_difference(differences)}; "
            "a store belongs to one table: choose another --store",
            differences,
        )


def create_array(files: LocalFiles, record: ArrayRecord) -> None:
    """Make an array, or finish making it. The caller has compared `record` with what is there (see FeatureStore).

    Raises:
        MismatchError: another writer made it first, of other features.
    """
    name = f"{records_folder(record.modality, record.name)}/fingerprint.json"
    data = canonical_json(record.to_json())
    if not files.create(name, data) and files.read(name) != data:
        raise MismatchError(f"another extraction has just made {record.modality}/{record.name} otherwise; run again")
    for path, text in record.metadata.items():
        full = f"{array_folder(record.modality, record.name)}/{path}"
        if not files.exists(full):
            files.write(full, text.encode())


class ArrayWriter:
    """Commits the shards of one array."""

    def __init__(self, files: LocalFiles, record: ArrayRecord) -> None:
        self.files = files
        self.record = record
        self.layout: ArrayLayout = record.layout

    def committed(self) -> dict[int, CommitRecord]:
        """Valid records by shard.

        Raises:
            DamagedError: a record is not what was committed.
            MismatchError: a record of other features.
        """
        folder = f"{records_folder(self.record.modality, self.record.name)}/commits"
        names = [name for name in self.files.list(folder) if name.endswith(".json")]
        records = (CommitRecord.from_bytes(self.files.read(f"{folder}/{name}"), f"{folder}/{name}") for name in names)
        return {record.shard: self._checked(record) for record in records}

    def pending(self) -> list[int]:
        """Shards without a record, in order."""
        done = self.committed()
        return [shard for shard in range(self.layout.n_shards) if shard not in done]

    def commit(
        self,
        shard: int,
        features: NDArray[np.floating],
        content: Sequence[str],
        quarantined: Sequence[QuarantinedRow] = (),
    ) -> CommitRecord:
        """Write one whole shard and its record.

        Args:
            features: [rows of the shard, dim] in the array's dtype; rows that are quarantined may hold anything.
            content: hash of each row's input, empty where it could not be read.

        Raises:
            StoreError: the operating system refused; DamagedError: what was read back differs;
            MismatchError: the shard is committed already, with other bytes.
        """
        chunk, status = self._chunks(shard, features, quarantined)
        objects = {
            name: self._put(name, data.data.cast("B"))
            for name, data in (
                (chunk_name(self.record.modality, self.record.name, "features", shard), chunk),
                (chunk_name(self.record.modality, self.record.name, "status", shard), status),
            )
        }
        if quarantined:
            name = quarantine_name(self.record.modality, self.record.name, shard)
            objects[name] = self._put_lines(name, quarantined)
        rows = self.layout.shard(shard)
        counts = (len(rows) - len(quarantined), len(quarantined))
        record = CommitRecord(
            shard, (rows.start, rows.stop), *counts, objects, list(content), self.record.fingerprint.digest
        )
        self._publish(record)
        return record

    def seal(self) -> None:
        """Mark the array as complete: a digest over all records, hence over all data.

        Raises:
            StoreError: shards are missing.
        """
        done = self.committed()
        if len(done) != self.layout.n_shards:
            raise StoreError(
                f"{self.record.modality}/{self.record.name}: {self.layout.n_shards - len(done)} shards missing"
            )
        digest = content_hash(b"".join(done[shard].to_bytes() for shard in range(self.layout.n_shards)))
        counts = {
            "n_ok": sum(r.n_ok for r in done.values()),
            "n_quarantined": sum(r.n_quarantined for r in done.values()),
        }
        name = f"{records_folder(self.record.modality, self.record.name)}/seal.json"
        self.files.create(name, seal_record({"digest": digest, "rows": self.layout.rows, **counts}))

    def _chunks(
        self, shard: int, features: NDArray[np.floating], quarantined: Sequence[QuarantinedRow]
    ) -> tuple[NDArray[np.floating], NDArray[np.uint8]]:
        """Full chunks as Zarr wants them: the last shard is padded, quarantined rows are NaN."""
        rows = self.layout.shard(shard)
        if features.shape != (len(rows), self.layout.dim):
            raise ValueError(f"shard {shard}: expected {(len(rows), self.layout.dim)}, found {features.shape}")
        chunk = np.full(
            (self.layout.shard_rows, self.layout.dim), np.nan, dtype=f"<{np.dtype(self.layout.dtype).str[1:]}"
        )
        chunk[: len(rows)] = features
        status = np.zeros(self.layout.shard_rows, dtype=np.uint8)
        status[: len(rows)] = OK
        bad = [row.row - rows.start for row in quarantined]
        chunk[bad], status[bad] = np.nan, QUARANTINED
        return chunk, status

    def _put(self, name: str, data: memoryview) -> ObjectRecord:
        """One chunk file: data and its crc32c, little-endian, exactly as Zarr's codec writes it."""
        check = checksum(data)
        ending = check.to_bytes(4, "little")
        self.files.write(name, data, ending)
        return ObjectRecord(data.nbytes + 4, self._read_back(name, data, ending), check)

    def _put_lines(self, name: str, rows: Sequence[QuarantinedRow]) -> ObjectRecord:
        data = b"".join(canonical_json(vars(row)) + b"\n" for row in rows)
        self.files.write(name, data)
        return ObjectRecord(len(data), self._read_back(name, memoryview(data), b""))

    def _read_back(self, name: str, data: memoryview, ending: Buffer) -> str:
        """Hash of what should be there, after comparing it with what is."""
        wanted = content_hash(b"".join((data, ending)))
        if content_hash(self.files.read(name)) != wanted:
            raise DamagedError(f"{self.files.path(name)}: what was read back is not what was written; check the disk")
        return wanted

    def _publish(self, record: CommitRecord) -> None:
        name = commit_name(self.record.modality, self.record.name, record.shard)
        if self.files.create(name, record.to_bytes()):
            return
        there = self._checked(CommitRecord.from_bytes(self.files.read(name), name))
        if there.objects != record.objects:
            raise MismatchError(f"{name}: another writer committed this shard with other bytes; run apecache verify")

    def _checked(self, record: CommitRecord) -> CommitRecord:
        if record.fingerprint != self.record.fingerprint.digest:
            raise MismatchError(f"shard {record.shard} of {self.record.name} was made by another encoder")
        return record


def checksum(data: memoryview) -> int:
    """crc32c of a buffer, without copying it (google_crc32c takes arrays, but no memoryview)."""
    return int(crc32c(np.frombuffer(data, np.uint8)))
