"""Write features: whole shards, committed one by one, by any number of processes.

Order of a commit, each step durable before the next: chunk files, quarantine list, read-back, then
the record, put if absent. A shard exists when its record does. There is no cursor: a resumed run
lists the records.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from google_crc32c import value as crc32c
from numpy.typing import NDArray

from apecache.errors import DamagedError, MismatchError, StoreError, counted, one_line
from apecache.fingerprint import (
    Json,
    canonical_json,
    content_hash,
    describe_difference,
    hash_buffers,
)
from apecache.storage.files import Buffer, Files
from apecache.store.layout import (
    CONTENT_COLUMN,
    OK,
    PAIRS,
    QUARANTINED,
    README,
    SEGMENTS,
    SOURCE,
    VIEWS,
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
from apecache.store.quantize import quantize
from apecache.store.records import (
    CommitRecord,
    ObjectRecord,
    digest_commits,
    read_commit,
    read_commits,
    read_record,
    seal_record,
)


@dataclass(frozen=True, kw_only=True)
class PairColumns:
    """Hold the pair table as columns.

    Columns of images are keys, splits and labels; columns of texts are captions, languages and
    image_rows.
    """

    keys: list[str]
    splits: list[str]
    labels: list[str]
    captions: list[str]
    languages: list[str]
    image_rows: list[int]
    """Row of each caption's image."""
    digest: str
    origin: str
    """How the user named the source."""
    options: Mapping[str, Json] = field(default_factory=dict)
    """How the source was opened."""
    contents: list[str] | None = None
    """In a block whose table is not one of the user's: the BLAKE3 of each image, empty where it is
    not known. Its captions may have the image row -1."""

    @property
    def view_only(self) -> bool:
        """Return whether only views refer to the rows."""
        return self.contents is not None


@dataclass(frozen=True, kw_only=True)
class QuarantinedRow:
    """Describe one row that could not be encoded."""

    row: int
    """Row of the whole array."""
    key: str
    reason: str
    detail: str


def create_store(files: Files, pairs: PairColumns, root: str, version: str) -> None:
    """Make the store for a table, or finish making it, or find that it exists.

    Args:
        files: Where the store is.
        pairs: The table.
        root: Where the images are, for `apecache repair` and for people.
        version: Version of apecache, for Zarr's attributes.

    Raises:
        MismatchError: The store belongs to another table.
        StoreError: The folder holds something else.
    """
    files.prepare()
    _refuse_foreign(files)
    files.put_if_absent(SOURCE, source_bytes(pairs, root))
    # Whoever wrote the record first, it must be that of this table.
    _require_same_source(read_record(files, SOURCE), _identity(pairs), files)
    # Before Zarr sees the store, which stumbles over temporary files in it.
    files.remove_temporary("records", ZARR, VIEWS)
    with files.exclusive("records"):
        if not files.exists(PAIRS):
            _write_pairs(files, pairs, version)


def add_segment(files: Files, segment: str, pairs: PairColumns, root: str, version: str) -> None:
    """Make `segments/<segment>`, a store of its own, and record it in the first segment.

    Raises:
        MismatchError: The store or the segment belongs to another table.
        StoreError: The folder holds something else.
    """
    create_store(files.child(f"{SEGMENTS}/{segment}"), pairs=pairs, root=root, version=version)
    name = segment_record_name(segment)
    files.put_if_absent(name, seal_record(name, _identity(pairs), of_view=pairs.view_only))
    _require_same_source(read_record(files, name), _identity(pairs), files)


def source_bytes(pairs: PairColumns, root: str) -> bytes:
    """Return the record that claims a store for a table.

    Origin and root say where the table and its images were, for people and for `apecache repair`.
    """
    source: dict[str, Json] = {"origin": pairs.origin, "root": root}
    if pairs.options:
        source["options"] = dict(pairs.options)
    return seal_record(SOURCE, {**_identity(pairs), **source}, of_view=pairs.view_only)


def _identity(pairs: PairColumns) -> dict[str, Json]:
    identity: dict[str, Json] = {
        "digest": pairs.digest,
        "n_images": len(pairs.keys),
        "n_texts": len(pairs.captions),
    }
    # Left out where it is False: other records are the same as without the field.
    return {**identity, "view_only": True} if pairs.view_only else identity


def table_columns(pairs: PairColumns) -> dict[str, tuple[str, list[str] | list[int]]]:
    """Return the columns of the pair table as they are stored: name -> (dimension, values)."""
    columns: dict[str, tuple[str, list[str] | list[int]]] = {
        "image_key": ("image", pairs.keys),
        "image_split": ("image", pairs.splits),
        "image_label": ("image", pairs.labels),
        "text_caption": ("text", pairs.captions),
        "text_language": ("text", pairs.languages),
        "text_image_row": ("text", pairs.image_rows),
    }
    if pairs.contents is not None:
        columns[CONTENT_COLUMN] = ("image", pairs.contents)
    return columns


def _write_pairs(files: Files, pairs: PairColumns, version: str) -> None:
    objects = {**root_objects(version), **pair_objects(table_columns(pairs))}
    staged = {name: (data,) for name, data in {**objects, "README.md": README.encode()}.items()}
    with files.stage(staged) as put:
        put(staged)
    hashes: Json = {
        name: {"bytes": len(data), "blake3": content_hash(data)} for name, data in objects.items()
    }
    # Last: this record makes the store exist.
    files.put_if_absent(PAIRS, seal_record(PAIRS, {"digest": pairs.digest, "objects": hashes}))


def _refuse_foreign(files: Files) -> None:
    # The source is looked for last. Another writer may be making the store at this moment, and the
    # source is what it writes first.
    is_made = files.exists(PAIRS)
    strange = files.list("") not in ([], ["records"]) or files.list("records")
    if strange and not files.exists(SOURCE):
        if is_made:
            raise DamagedError(
                f"{files.where(SOURCE)} is missing; write it again with: apecache repair"
            )
        raise StoreError(f"{files.place} is not empty and not a store; choose another --store")


def _require_same_source(
    recorded: Mapping[str, Json],
    expected: Mapping[str, Json],
    files: Files,
) -> None:
    differences = []
    for key in sorted(expected):
        if expected[key] != recorded.get(key):
            differences.append((key, expected[key], recorded.get(key)))
    if differences:
        origin = one_line(recorded.get("origin"))
        raise MismatchError(
            f"{files.place} was made from another table ({origin}): "
            f"{describe_difference(differences)}; "
            "a store belongs to one table: choose another --store",
            differences,
        )


def create_array(files: Files, record: ArrayRecord) -> None:
    """Make an array, or finish making it.

    The caller has compared `record` with the record that exists, if any (see FeatureStore).

    Raises:
        MismatchError: Another writer made it first, with other features.
    """
    name = f"{records_folder(record.modality, record.name)}/fingerprint.json"
    data = seal_record(name, record.to_json())
    if not files.put_if_absent(name, data) and files.read(name) != data:
        raise MismatchError(
            f"another extraction has just made {record.modality}/{record.name} otherwise; run again"
        )
    for path, text in record.metadata.items():
        files.put_if_absent(f"{array_folder(record.modality, record.name)}/{path}", text.encode())


class ArrayWriter:
    """Commit the shards of one array."""

    def __init__(self, files: Files, record: ArrayRecord) -> None:
        self.files = files
        self.record = record
        self.layout: ArrayLayout = record.layout

    def committed(self) -> dict[int, CommitRecord]:
        """Return the valid records by shard, without their `content`.

        Raises:
            DamagedError: A record is not what was committed.
            MismatchError: A record is of other features.
        """
        records = {}
        for record, _ in read_commits(self.files, self.record):
            records[record.shard] = record.without_content()
        return records

    def pending(self) -> list[int]:
        """Return the shards without a record, in order."""
        committed_shards = {record.shard for record, _ in read_commits(self.files, self.record)}
        return [shard for shard in range(self.layout.n_shards) if shard not in committed_shards]

    def commit(
        self,
        shard: int,
        features: NDArray[Any],
        content: Sequence[str],
        quarantined: Sequence[QuarantinedRow] = (),
        lengths: NDArray[np.integer] | None = None,
        scales: NDArray[np.float32] | None = None,
    ) -> CommitRecord:
        """Write one whole shard and its record.

        Args:
            shard: Number of the shard.
            features: [rows of the shard, *row_shape], float16 or float32, not normalized. They are
                written in the array's dtype. Quarantined rows may hold anything.
            content: Hash of each row's input; empty where it could not be read.
            quarantined: Rows that could not be encoded.
            lengths: [rows of the shard], tokens of each row, if the array is ragged.
            scales: With them, `features` are the int8 of an array as it stores them, so that they
                are copied bit by bit.

        Raises:
            StoreError: The operating system or the storage refused.
            DamagedError: What was read back differs from what was written.
            MismatchError: The shard is committed already with other bytes, which stay.
        """
        rows = self.layout.shard(shard)
        bad = {row.row for row in quarantined}
        if len(content) != len(rows) or len(bad) != len(quarantined) or not bad <= set(rows):
            raise ValueError(
                f"shard {shard}: content and quarantined rows must be those of rows {rows}"
            )
        chunks = self._chunks(
            shard,
            features=features,
            quarantined=quarantined,
            lengths=lengths,
            scales=scales,
        )
        payloads = self._payloads(shard, chunks, quarantined)
        objects = {name: _describe(payload) for name, payload in payloads.items()}
        record = CommitRecord(
            shard=shard,
            rows=(rows.start, rows.stop),
            n_ok=len(rows) - len(bad),
            n_quarantined=len(bad),
            objects=objects,
            content=list(content),
            fingerprint=self.record.fingerprint.digest,
        )
        self._store(record, payloads)
        return record

    def _store(self, record: CommitRecord, payloads: Mapping[str, tuple[Buffer, ...]]) -> None:
        """Write the objects of a shard, then its record; of a committed shard, what it lacks."""
        hash_by_name = {name: entry.blake3 for name, entry in record.objects.items()}
        record_name = commit_name(self.record.modality, self.record.name, record.shard)
        lost = list(payloads)
        if self.files.exists(record_name):
            lost = self._not_standing(hash_by_name)
        # The data is written before the lock is taken: other shards are committed meanwhile.
        with (
            self.files.stage({name: payloads[name] for name in lost}) as put,
            self.files.exclusive(f"{self._folder}/commits"),
        ):
            # Before anything is put: a shard that is committed with other bytes must stay.
            if self._committed_alike(record):
                # Of a committed shard, only chunks that are lost or damaged are put again.
                lost = self._not_standing({name: hash_by_name[name] for name in lost})
            if lost:
                put(lost)
            failed = self._not_standing({name: hash_by_name[name] for name in lost})
            if failed:
                raise DamagedError(
                    f"{self.files.where(failed[0])}: what was read back is not what was written; "
                    "check the disk"
                )
            # Chunks are durable by now, so a record never names what a power cut could lose.
            # Another writer may have been first. With the same bytes that is as good.
            if not self.files.put_if_absent(record_name, record.to_bytes()):
                self._committed_alike(record)

    def seal(self) -> None:
        """Mark the array as complete: a digest over all records, hence over all data.

        Raises:
            StoreError: Shards are missing.
            DamagedError: It was sealed with other records.
        """
        n_ok = 0
        n_quarantined = 0
        hashes = []
        for record, record_hash in read_commits(self.files, self.record):
            n_ok += record.n_ok
            n_quarantined += record.n_quarantined
            hashes.append(record_hash)
        if len(hashes) != self.layout.n_shards:
            missing = self.layout.n_shards - len(hashes)
            raise StoreError(
                f"{self.record.modality}/{self.record.name}: {counted(missing, 'shard')} missing"
            )
        digest = digest_commits(hashes)
        body: dict[str, Json] = {
            "digest": digest,
            "rows": self.layout.rows,
            "n_ok": n_ok,
            "n_quarantined": n_quarantined,
        }
        name = f"{self._folder}/seal.json"
        # The last record may be that of a writer that was killed before the entry was durable.
        if hashes:
            self.files.settle(f"{self._folder}/commits")
        put = self.files.put_if_absent(name, seal_record(name, body))
        if not put and read_record(self.files, name).get("digest") != digest:
            raise DamagedError(
                f"{self.files.where(name)}: sealed with other records; restore the file"
            )

    @property
    def _folder(self) -> str:
        return records_folder(self.record.modality, self.record.name)

    def _payloads(
        self,
        shard: int,
        chunks: Mapping[str, NDArray[Any]],
        quarantined: Sequence[QuarantinedRow],
    ) -> dict[str, tuple[Buffer, ...]]:
        """Return every object of a shard; chunks are data and crc32c, as Zarr writes them."""
        payloads: dict[str, tuple[Buffer, ...]] = {}
        for part_name, array in chunks.items():
            name = chunk_name(self.record, part_name, shard)
            data = array.data.cast("B")
            check = checksum(data).to_bytes(4, "little")
            payloads[name] = (data, check)
        if quarantined:
            name = quarantine_name(self.record.modality, self.record.name, shard)
            lines = b"".join(canonical_json(vars(row)) + b"\n" for row in quarantined)
            payloads[name] = (lines,)
        return payloads

    def _chunks(
        self,
        shard: int,
        features: NDArray[Any],
        quarantined: Sequence[QuarantinedRow],
        lengths: NDArray[np.integer] | None,
        scales: NDArray[np.float32] | None,
    ) -> dict[str, NDArray[Any]]:
        """Return full chunks as Zarr expects them.

        The last shard is padded, quarantined rows are NaN, and padding tokens are 0.
        """
        rows = self.layout.shard(shard)
        layout = self.layout
        expected_shape = (len(rows), *layout.row_shape)
        if features.shape != expected_shape or (lengths is not None) != layout.ragged:
            raise ValueError(
                f"shard {shard}: expected {expected_shape}, found {features.shape}, lengths "
                f"{lengths is not None}"
            )
        stored_dtypes: dict[str, np.dtype[Any]] = {}
        for part_name, (dtype, _) in layout.parts.items():
            stored_dtypes[part_name] = np.dtype(dtype).newbyteorder("<")
        is_plain = not layout.scaled and features.dtype == stored_dtypes["features"]
        if is_plain and lengths is None and not quarantined and len(rows) == layout.shard_rows:
            # Nothing to pad or to mark: the features are written without a copy.
            status_of_all = np.full(len(rows), OK, dtype=stored_dtypes["status"])
            return {"features": np.ascontiguousarray(features), "status": status_of_all}
        chunks: dict[str, NDArray[Any]] = {}
        for part_name, (_, shape) in layout.parts.items():
            stored_dtype = stored_dtypes[part_name]
            chunks[part_name] = np.zeros((layout.shard_rows, *shape), dtype=stored_dtype)
        chunk = chunks["features"]
        status = chunks["status"]
        # int8 has no NaN: a missing vector has the scale NaN instead.
        nan_marked = chunks["scale" if layout.scaled else "features"]
        if scales is not None:
            chunk[: len(rows)] = features
            nan_marked[: len(rows)] = scales
        elif layout.scaled:
            chunk[: len(rows)], nan_marked[: len(rows)] = quantize(features)
        else:
            chunk[: len(rows)] = features
        nan_marked[len(rows) :] = np.nan
        # Rows beyond the last keep the status MISSING, which is 0.
        status[: len(rows)] = OK
        bad = [row.row - rows.start for row in quarantined]
        if lengths is not None:
            chunks["length"][: len(rows)] = lengths
            chunks["length"][bad] = 0
            # Tokens behind a row's own are padding, whatever the encoder left there.
            beyond = np.arange(layout.tokens or 0) >= chunks["length"][: len(rows), None]
            chunk[: len(rows)][beyond] = 0
            nan_marked[: len(rows)][beyond] = 0
        if layout.scaled:
            chunk[bad] = 0
        # After the padding, which would hide that these rows are missing.
        nan_marked[bad] = np.nan
        status[bad] = QUARANTINED
        return chunks

    def _not_standing(self, hash_by_name: Mapping[str, str]) -> list[str]:
        """Return the objects that are missing or have another hash."""
        names: list[str] = []
        for name, expected_hash in hash_by_name.items():
            try:
                stands = self.files.digest(name) == expected_hash
            except FileNotFoundError:
                stands = False
            if not stands:
                names.append(name)
        return names

    def _committed_alike(self, record: CommitRecord) -> bool:
        """Return whether the shard is committed already.

        Raises:
            MismatchError: It is committed with other bytes.
        """
        name = commit_name(self.record.modality, self.record.name, record.shard)
        if not self.files.exists(name):
            return False
        committed, _ = read_commit(self.files, self.record, record.shard)
        if committed.objects != record.objects:
            raise MismatchError(
                f"{name}: another writer committed this shard with other bytes; run apecache verify"
            )
        return True


def _describe(payload: tuple[Buffer, ...]) -> ObjectRecord:
    n_bytes = sum(memoryview(buffer).nbytes for buffer in payload)
    # Chunks have two buffers: the data, and their crc32c.
    check = int.from_bytes(payload[-1], "little") if len(payload) == 2 else None
    return ObjectRecord(n_bytes, blake3=hash_buffers(payload), crc32c=check)


def checksum(data: memoryview) -> int:
    """Return the crc32c of a buffer, without copying it."""
    # google_crc32c takes arrays, but no memoryview.
    return int(crc32c(np.frombuffer(data, np.uint8)))
