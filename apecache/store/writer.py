"""Writing features: whole shards, committed one by one, by as many processes as like to.

Order of a commit (each step durable before the next): chunk files, quarantine list, read-back, record put if absent.
A shard exists when its record does. There is no cursor: resuming is listing the records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from apecache.errors import DamagedError, MismatchError, StoreError, one_line
from apecache.fingerprint import Json, canonical_json, content_hash, describe_difference
from apecache.store.commit import (
    CommitRecord,
    ObjectRecord,
    digest_commits,
    read_commit,
    read_commits,
    read_record,
    seal_record,
)
from apecache.store.files import Buffer, Files
from apecache.store.layout import (
    OK,
    PAIRS,
    QUARANTINED,
    README,
    SEGMENTS,
    SOURCE,
    ZARR,
    ArrayLayout,
    ArrayRecord,
    array_folder,
    chunk_name,
    commit_name,
    pair_objects,
    quarantine_name,
    records_folder,
    root_objects,
    segment_record_name,
)
from apecache.store.quantise import quantise


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


def create_store(files: Files, pairs: PairColumns, root: str, version: str) -> None:
    """Make the store for a table, or finish making it, or find that it is there.

    Raises:
        MismatchError: the store belongs to another table.
        StoreError: the folder holds something else.
    """
    files.prepare()
    _refuse_foreign(files)
    files.create(SOURCE, source_bytes(pairs, root))
    _require_same_source(read_record(files, SOURCE), _identity(pairs), files)
    files.remove_temporary("records", ZARR)
    with files.exclusive("records"):
        if not files.exists(PAIRS):
            _write_pairs(files, pairs, version)


def add_segment(files: Files, segment: str, pairs: PairColumns, root: str, version: str) -> None:
    """Make `segments/<segment>`, a store of its own, and record in the first that it is there.

    Raises as `create_store` does; MismatchError also if another table has that place.
    """
    create_store(files.child(f"{SEGMENTS}/{segment}"), pairs, root, version)
    name = segment_record_name(segment)
    files.create(name, seal_record(name, _identity(pairs)))
    _require_same_source(read_record(files, name), _identity(pairs), files)


def source_bytes(pairs: PairColumns, root: str) -> bytes:
    """The record that claims a store for a table; origin and root are where it lay, for people and for repair."""
    return seal_record(SOURCE, {**_identity(pairs), "origin": pairs.origin, "root": root})


def _identity(pairs: PairColumns) -> dict[str, Json]:
    return {"digest": pairs.digest, "n_images": len(pairs.keys), "n_texts": len(pairs.captions)}


def table_columns(pairs: PairColumns) -> dict[str, tuple[str, list[str] | list[int]]]:
    """Columns of the pair table as they are stored: name -> (dimension, values)."""
    return {
        "image_key": ("image", pairs.keys),
        "image_split": ("image", pairs.splits),
        "image_label": ("image", pairs.labels),
        "text_caption": ("text", pairs.captions),
        "text_language": ("text", pairs.languages),
        "text_image_row": ("text", pairs.image_rows),
    }


def _write_pairs(files: Files, pairs: PairColumns, version: str) -> None:
    objects = {**root_objects(version), **pair_objects(table_columns(pairs))}
    for name, data in objects.items():
        files.write(name, data)
    files.write("README.md", README.encode())
    hashes: Json = {name: {"bytes": len(data), "blake3": content_hash(data)} for name, data in objects.items()}
    files.create(PAIRS, seal_record(PAIRS, {"digest": pairs.digest, "objects": hashes}))


def _refuse_foreign(files: Files) -> None:
    # Looked for last: another writer may be making the store at this moment, and the source is what it puts first.
    made, strange = files.exists(PAIRS), files.list("") not in ([], ["records"]) or files.list("records")
    if strange and not files.exists(SOURCE):
        if made:
            raise DamagedError(f"{files.where(SOURCE)} is missing; write it again with: apecache repair")
        raise StoreError(f"{files.place} is not empty and not a store; choose another --store")


def _require_same_source(found: Mapping[str, Json], wanted: Mapping[str, Json], files: Files) -> None:
    differences = [(key, wanted[key], found.get(key)) for key in sorted(wanted) if wanted[key] != found.get(key)]
    if differences:
        origin = one_line(found.get("origin"))
        raise MismatchError(
            f"{files.place} was made from another table ({origin}): {describe_difference(differences)}; "
            "a store belongs to one table: choose another --store",
            differences,
        )


def create_array(files: Files, record: ArrayRecord) -> None:
    """Make an array, or finish making it. The caller has compared `record` with what is there (see FeatureStore).

    Raises:
        MismatchError: another writer made it first, of other features.
    """
    name = f"{records_folder(record.modality, record.name)}/fingerprint.json"
    data = seal_record(name, record.to_json())
    if not files.create(name, data) and files.read(name) != data:
        raise MismatchError(f"another extraction has just made {record.modality}/{record.name} otherwise; run again")
    for path, text in record.metadata.items():
        files.create(f"{array_folder(record.modality, record.name)}/{path}", text.encode())


class ArrayWriter:
    """Commits the shards of one array."""

    def __init__(self, files: Files, record: ArrayRecord) -> None:
        self.files = files
        self.record = record
        self.layout: ArrayLayout = record.layout

    def committed(self) -> dict[int, CommitRecord]:
        """Valid records by shard, without their `content`.

        Raises:
            DamagedError: a record is not what was committed.
            MismatchError: a record of other features.
        """
        return {record.shard: record.without_content() for record, _ in read_commits(self.files, self.record)}

    def pending(self) -> list[int]:
        """Shards without a record, in order."""
        done = {record.shard for record, _ in read_commits(self.files, self.record)}
        return [shard for shard in range(self.layout.n_shards) if shard not in done]

    def commit(
        self,
        shard: int,
        features: NDArray[np.floating],
        content: Sequence[str],
        quarantined: Sequence[QuarantinedRow] = (),
        lengths: NDArray[np.integer] | None = None,
    ) -> CommitRecord:
        """Write one whole shard and its record.

        Args:
            features: [rows of the shard, *row_shape], float16 or float32, which are written in the array's dtype; rows
                that are quarantined may hold anything.
            content: hash of each row's input, empty where it could not be read.
            lengths: [rows of the shard], tokens of each row, if the array is ragged.

        Raises:
            StoreError: the operating system refused; DamagedError: what was read back differs;
            MismatchError: the shard is committed already, with other bytes, which stay.
        """
        rows = self.layout.shard(shard)
        bad = {row.row for row in quarantined}
        if len(content) != len(rows) or len(bad) != len(quarantined) or not bad <= set(rows):
            raise ValueError(f"shard {shard}: content and quarantined rows must be those of rows {rows}")
        payloads = self._payloads(shard, self._chunks(shard, features, quarantined, lengths), quarantined)
        objects = {name: _describe(payload) for name, payload in payloads.items()}
        counts = (len(rows) - len(bad), len(bad))
        digest = self.record.fingerprint.digest
        record = CommitRecord(shard, (rows.start, rows.stop), *counts, objects, list(content), digest)
        with self.files.exclusive(f"{self._folder}/commits"):
            committed = self._committed_alike(record)
            for name, payload in payloads.items():
                if not committed or not self._stands(name, objects[name].blake3):
                    self._put(name, payload, objects[name].blake3)
            if not self.files.create(commit_name(self.record.modality, self.record.name, shard), record.to_bytes()):
                self._committed_alike(record)
        return record

    def seal(self) -> None:
        """Mark the array as complete: a digest over all records, hence over all data.

        Raises:
            StoreError: shards are missing. DamagedError: it was sealed with other records.
        """
        sealed = [(record.n_ok, record.n_quarantined, of) for record, of in read_commits(self.files, self.record)]
        if len(sealed) != self.layout.n_shards:
            missing = self.layout.n_shards - len(sealed)
            raise StoreError(f"{self.record.modality}/{self.record.name}: {missing} shards missing")
        digest = digest_commits(of for *_, of in sealed)
        totals = {"n_ok": sum(ok for ok, *_ in sealed), "n_quarantined": sum(bad for _, bad, _ in sealed)}
        name = f"{self._folder}/seal.json"
        # The last record may be that of a writer that was killed before it made the entry durable.
        self.files.settle(f"{self._folder}/commits")
        put = self.files.create(name, seal_record(name, {"digest": digest, "rows": self.layout.rows, **totals}))
        if not put and read_record(self.files, name).get("digest") != digest:
            raise DamagedError(f"{self.files.where(name)}: sealed with other records; restore the file")

    @property
    def _folder(self) -> str:
        return records_folder(self.record.modality, self.record.name)

    def _payloads(
        self, shard: int, chunks: Mapping[str, NDArray[Any]], quarantined: Sequence[QuarantinedRow]
    ) -> dict[str, tuple[Buffer, ...]]:
        """Every object of a shard. Chunks are data and crc32c, exactly as Zarr's codecs write them."""
        payloads: dict[str, tuple[Buffer, ...]] = {}
        for part, array in chunks.items():
            data = array.data.cast("B")
            payloads[chunk_name(self.record, part, shard)] = (data, checksum(data).to_bytes(4, "little"))
        if quarantined:
            lines = b"".join(canonical_json(vars(row)) + b"\n" for row in quarantined)
            payloads[quarantine_name(self.record.modality, self.record.name, shard)] = (lines,)
        return payloads

    def _chunks(
        self,
        shard: int,
        features: NDArray[np.floating],
        quarantined: Sequence[QuarantinedRow],
        lengths: NDArray[np.integer] | None,
    ) -> dict[str, NDArray[Any]]:
        """Full chunks as Zarr wants them: the last shard is padded, quarantined rows are NaN, padding tokens are 0."""
        rows, layout = self.layout.shard(shard), self.layout
        wanted = (len(rows), *layout.row_shape)
        if features.shape != wanted or (lengths is not None) != layout.ragged:
            raise ValueError(f"shard {shard}: expected {wanted}, found {features.shape}, lengths {lengths is not None}")
        chunks: dict[str, NDArray[Any]] = {
            part: np.zeros((layout.shard_rows, *shape), dtype=np.dtype(dtype).newbyteorder("<"))
            for part, (dtype, shape) in layout.parts.items()
        }
        chunk, status, gaps = chunks["features"], chunks["status"], chunks["scale" if layout.scaled else "features"]
        if layout.scaled:
            chunk[: len(rows)], gaps[: len(rows)] = quantise(features)
        else:
            chunk[: len(rows)] = features
        gaps[len(rows) :] = np.nan
        status[: len(rows)] = OK
        bad = [row.row - rows.start for row in quarantined]
        if lengths is not None:
            chunks["length"][: len(rows)] = lengths
            chunks["length"][bad] = 0
            beyond = np.arange(layout.tokens or 0) >= chunks["length"][: len(rows), None]
            chunk[: len(rows)][beyond], gaps[: len(rows)][beyond] = 0, 0
        if layout.scaled:
            chunk[bad] = 0
        gaps[bad], status[bad] = np.nan, QUARANTINED
        return chunks

    def _put(self, name: str, payload: tuple[Buffer, ...], wanted: str) -> None:
        """Write one object and compare what is there with what should be."""
        self.files.write(name, *payload)
        if not self._stands(name, wanted):
            raise DamagedError(f"{self.files.where(name)}: what was read back is not what was written; check the disk")

    def _stands(self, name: str, wanted: str) -> bool:
        try:
            return content_hash(self.files.read(name)) == wanted
        except FileNotFoundError:
            return False

    def _committed_alike(self, record: CommitRecord) -> bool:
        """False if the shard is not committed. Raises MismatchError if it is, with other bytes."""
        name = commit_name(self.record.modality, self.record.name, record.shard)
        if not self.files.exists(name):
            return False
        if read_commit(self.files, self.record, record.shard)[0].objects != record.objects:
            raise MismatchError(f"{name}: another writer committed this shard with other bytes; run apecache verify")
        return True


def _describe(payload: tuple[Buffer, ...]) -> ObjectRecord:
    data = b"".join(payload)
    check = int.from_bytes(payload[-1], "little") if len(payload) == 2 else None
    return ObjectRecord(len(data), content_hash(data), check)


def checksum(data: memoryview) -> int:
    """crc32c of a buffer, without copying it (google_crc32c takes arrays, but no memoryview)."""
    return int(crc32c(np.frombuffer(data, np.uint8)))
