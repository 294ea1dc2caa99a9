"""Verify a store: check every object against its record, and report objects without a record."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_place
from apecache.errors import ApecacheError, DamagedError, StoreError
from apecache.fingerprint import Modality, content_hash
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.open import open_files
from apecache.store.layout import (
    PAIRS,
    README,
    SEGMENT_RECORDS,
    SEGMENTS,
    SOURCE,
    ZARR,
    ArrayRecord,
    array_folder,
    chunk_name,
    commit_name,
    quarantine_name,
    records_folder,
    segment_record_name,
)
from apecache.store.problem import Kind, Problem
from apecache.store.records import CommitRecord, digest_commits, is_commit, read_commit, read_record
from apecache.store.verify_views import check_views

Progress = Callable[[int], None]
"""Called with the number of bytes of every object that was hashed."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """Report the result of a verification."""

    store: str | Path
    n_objects: int
    """Number of objects that were read and hashed."""
    n_bytes: int
    """Number of bytes of these objects."""
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        return not any(problem.harmful for problem in self.problems)


def verify_store(
    store: AnyPath,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """Read and hash every object, also those of appended segments.

    Args:
        store: Folder or URL of the store.
        progress: Called with the bytes of every object that was hashed.
        threads: Number of parallel reads; None for as many as are worth it where the store is.

    Raises:
        StoreError: There is not a store, or it has a newer format.
    """
    return verify_files(open_files(as_place(store, "store")), progress, threads)


def verify_files(
    files: Files,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """Verify a store that is opened already, as `verify_store` does."""
    first = verify_segment(files, progress, threads)
    first = replace(first, problems=(*first.problems, *_segment_problems(files)))
    reports: dict[str, VerifyReport] = {}
    for folder in begun_segments(files):
        reports[folder] = verify_segment(files.child(folder), progress, threads)
    return _with_segments(first, reports)


def verify_segment(
    files: Files,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """Verify one segment alone; the store itself is the first. Raises as `verify_store` does."""
    if not files.exists(SOURCE) and not files.exists(PAIRS):
        raise StoreError(f"{files.place} is not a store (make one with: apecache extract)")
    check = _Check(files, progress, threads)
    check.table()
    for modality, name in array_names(files):
        check.array(modality, name)
    check.views()
    check.strangers()
    return VerifyReport(
        store=files.place,
        n_objects=check.n_objects,
        n_bytes=check.n_bytes,
        problems=tuple(check.problems),
    )


def _segment_problems(files: Files) -> Iterator[Problem]:
    """Yield segments that are lost or swapped, or have no record in the store."""
    begun_names = {folder.rpartition("/")[2] for folder in begun_segments(files)}
    recorded = {name.removesuffix(".json") for name in files.list(SEGMENT_RECORDS)}
    for segment in sorted(begun_names | recorded):
        name = segment_record_name(segment)
        segment_files = files.child(f"{SEGMENTS}/{segment}")
        if segment not in begun_names:
            yield Problem(
                kind="missing",
                object=f"{SEGMENTS}/{segment}",
                detail="a segment that was appended is not there",
            )
            continue
        if segment not in recorded:
            # Without an array's record (records/MODALITY/NAME/FILE.json) it was only begun.
            if any(
                name.count("/") == 3 and name.endswith(".json")
                for name in segment_files.sizes("records")
            ):
                yield Problem(
                    kind="missing",
                    object=name,
                    detail="the segment has no record in the store",
                )
            continue
        try:
            recorded_source = read_record(files, name)
            source = read_record(segment_files, SOURCE)
        except DamagedError as error:
            # A damaged source of the segment is reported when the segment itself is verified.
            if not files.exists(name) or name in str(error):
                yield Problem(kind="damaged", object=name, detail=str(error))
            continue
        if recorded_source["digest"] != source["digest"]:
            yield Problem(
                kind="damaged",
                object=f"{SEGMENTS}/{segment}",
                detail="not the segment that was appended in its place",
            )


def _with_segments(first: VerifyReport, segments: Mapping[str, VerifyReport]) -> VerifyReport:
    """Join reports; the objects of a segment are named from the store's root."""
    n_objects = first.n_objects
    n_bytes = first.n_bytes
    problems = list(first.problems)
    for folder, report in segments.items():
        n_objects += report.n_objects
        n_bytes += report.n_bytes
        for problem in report.problems:
            problems.append(replace(problem, object=f"{folder}/{problem.object}"))
    return VerifyReport(
        store=first.store,
        n_objects=n_objects,
        n_bytes=n_bytes,
        problems=tuple(problems),
    )


def begun_segments(files: Files) -> list[str]:
    """Return the folders of the appended segments that have any record, in order."""
    folders = []
    for name in files.list(SEGMENTS):
        folder = f"{SEGMENTS}/{name}"
        if any(record.endswith(".json") for record in files.list(f"{folder}/records")):
            folders.append(folder)
    return folders


def array_names(files: Files) -> list[tuple[Modality, str]]:
    """Return (modality, name) of every array that has records or data, images first.

    A folder alone, which a killed writer had only begun, is not an array.
    """
    modalities: tuple[Modality, ...] = ("image", "text")
    arrays: list[tuple[Modality, str]] = []
    for modality in modalities:
        names = {*files.list(f"records/{modality}"), *files.list(f"{ZARR}/{modality}")}
        for name in sorted(names - {"zarr.json"}):
            folders = (records_folder(modality, name), array_folder(modality, name))
            if any(any(_objects(files, folder)) for folder in folders):
                arrays.append((modality, name))
    return arrays


def _objects(files: Files, folder: str) -> Iterator[str]:
    """Return the names of all objects below a folder, without temporary ones."""
    return (name for name in files.sizes(folder) if not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


class _Check:
    """Check one segment, and collect its problems.

    Attributes:
        problems: What is wrong.
        known: Names of all objects that a record or a rule accounts for.
    """

    def __init__(self, files: Files, progress: Progress, threads: int | None) -> None:
        self.files = files
        self.progress = progress
        self.threads = threads or files.readers
        self.problems: list[Problem] = []
        self.known: set[str] = {SOURCE, PAIRS, "README.md"}
        self.known.update(f"{SEGMENT_RECORDS}/{name}" for name in files.list(SEGMENT_RECORDS))
        self.n_objects = 0
        self.n_bytes = 0

    def table(self) -> None:
        """Check the pair table, Zarr's metadata of the root, and the README."""
        source = self._record(SOURCE)
        pairs = self._record(PAIRS)
        if source and pairs and source.get("digest") != pairs.get("digest"):
            self._add("damaged", PAIRS, f"belongs to another table than {SOURCE}")
        entries = pairs["objects"] if pairs else {}
        objects: list[tuple[str, str, int | None]] = []
        for name, entry in entries.items():
            objects.append((name, entry["blake3"], None))
        objects.append(("README.md", content_hash(README), None))
        self._hash_all(objects)
        # The objects of a lost record are not foreign.
        if pairs is None:
            self.known.update(_objects(self.files, f"{ZARR}/pairs"))
            self.known.update(f"{ZARR}/{group}zarr.json" for group in ("", "image/", "text/"))

    def array(self, modality: Modality, name: str) -> None:
        """Check an array: its fingerprint, Zarr's metadata, its shards and its seal."""
        array = (modality, name)
        record_name = f"{records_folder(modality, name)}/fingerprint.json"
        value = self._record(record_name, array)
        try:
            record = ArrayRecord.from_json(modality, name, value) if value else None
        except StoreError as error:
            self._add("damaged", name=record_name, detail=str(error), array=array)
            record = None
        source = self._record(SOURCE)
        if record and source and record.table != source["digest"]:
            self._add("damaged", name=record_name, detail="an array of another table", array=array)
        # Without a layout nothing is known about the array's other objects.
        if record is None:
            self._disown(modality, name)
            return
        metadata: list[tuple[str, str, int | None]] = []
        for path, text in record.metadata.items():
            metadata.append((f"{array_folder(modality, name)}/{path}", content_hash(text), None))
        self._hash_all(metadata, array)
        commits, hashes = self._commits(record)
        self._seal(record, commits, hashes)
        self._uncommitted(record, commits)

    def views(self) -> None:
        """Check the views, and what is remembered of image files."""
        check = check_views(self.files)
        self.problems += check.problems
        self.known |= check.known
        self.n_objects += len(check.object_bytes)
        for n_bytes in check.object_bytes:
            self.n_bytes += n_bytes
            self.progress(n_bytes)

    def strangers(self) -> None:
        """Report objects below the store that nothing accounts for, except those of segments."""
        segments = begun_segments(self.files)
        for name in self.files.sizes(""):
            if name in self.known or any(name.startswith(f"{folder}/") for folder in segments):
                continue
            if _is_temporary(name):
                self._add("temporary", name, "left by a killed run")
            else:
                self._add("foreign", name, "not ours")

    def _commits(self, record: ArrayRecord) -> tuple[dict[int, CommitRecord], list[str]]:
        """Check the committed shards.

        Returns:
            Valid records by shard, and the hash of each record.
        """
        commits: dict[int, CommitRecord] = {}
        hashes = []
        folder = records_folder(record.modality, record.name)
        files = self.files.list(f"{folder}/commits")
        shards = [int(file.removesuffix(".json")) for file in files if is_commit(file)]
        with ThreadPoolExecutor(self.threads) as pool:
            read = pool.map(lambda shard: self._commit(record, shard), shards)
            for shard, commit in zip(shards, read, strict=True):
                name = commit_name(record.modality, record.name, shard)
                self.known.add(name)
                # An error here is a result, so that one damaged record does not end the pass.
                if isinstance(commit, ApecacheError):
                    self._add(
                        "damaged",
                        name=name,
                        detail=str(commit),
                        array=(record.modality, record.name),
                        shard=shard,
                    )
                    self._disown_shard(record, shard)
                else:
                    commits[shard], record_hash = commit
                    hashes.append(record_hash)
        objects: list[tuple[str, str, int | None]] = []
        for shard, valid in commits.items():
            objects += [(name, entry.blake3, shard) for name, entry in valid.objects.items()]
        self._hash_all(objects, (record.modality, record.name))
        return commits, hashes

    def _commit(self, record: ArrayRecord, shard: int) -> tuple[CommitRecord, str] | ApecacheError:
        """Return a record without its `content`, and its hash; or what is wrong with it."""
        try:
            commit, record_hash = read_commit(self.files, record, shard)
        except ApecacheError as error:
            return error
        return commit.without_content(), record_hash

    def _seal(
        self,
        record: ArrayRecord,
        commits: Mapping[int, CommitRecord],
        hashes: Sequence[str],
    ) -> None:
        """Check that a sealed array has exactly the records that were sealed."""
        array = (record.modality, record.name)
        name = f"{records_folder(*array)}/seal.json"
        if not self.files.exists(name):
            if len(commits) == record.layout.n_shards:
                self._add(
                    "unsealed",
                    name=name,
                    detail="every shard is committed, but the array is not sealed",
                    array=array,
                )
            return
        seal = self._record(name, array)
        missing = [shard for shard in range(record.layout.n_shards) if shard not in commits]
        # A damaged record is reported already, and is not missing as well.
        reported = {problem.shard for problem in self.problems if problem.array == array}
        for shard in missing:
            if shard not in reported:
                self._add(
                    "missing",
                    name=commit_name(*array, shard),
                    detail="the commit record is missing",
                    array=array,
                    shard=shard,
                )
                self._disown_shard(record, shard)
        if seal and not missing and seal.get("digest") != digest_commits(hashes):
            self._add(
                "damaged",
                name=name,
                detail="the array was sealed with other records",
                array=array,
            )

    def _uncommitted(self, record: ArrayRecord, commits: Mapping[int, CommitRecord]) -> None:
        """Report chunks that a killed run wrote before it could commit them."""
        for shard in range(record.layout.n_shards):
            if shard in commits:
                continue
            for name in shard_objects(record, shard):
                if name not in self.known and self.files.exists(name):
                    self._add(
                        "uncommitted",
                        name=name,
                        detail="no commit record",
                        array=(record.modality, record.name),
                        shard=shard,
                    )
                    self.known.add(name)

    def _record(
        self,
        name: str,
        array: tuple[Modality, str] | None = None,
    ) -> dict[str, Any] | None:
        """Read a record; report it and return None if it is damaged or missing."""
        self.known.add(name)
        try:
            return read_record(self.files, name)
        except DamagedError as error:
            # `read_record` raises the same error for a missing record.
            self._add(
                "damaged" if self.files.exists(name) else "missing",
                name=name,
                detail=str(error),
                array=array,
            )
        return None

    def _hash_all(
        self,
        objects: Sequence[tuple[str, str, int | None]],
        array: tuple[Modality, str] | None = None,
    ) -> None:
        """Hash objects in parallel, and report those that differ from their records.

        Args:
            objects: (name, the hash it should have, the shard it belongs to).
            array: The array that they belong to.
        """
        names = [name for name, _, _ in objects]
        hashes = [blake3 for _, blake3, _ in objects]
        self.known.update(names)
        with ThreadPoolExecutor(self.threads) as pool:
            outcomes = pool.map(self._hash, names, hashes)
            for (*_, shard), (size, problem) in zip(objects, outcomes, strict=True):
                self.n_objects += 1
                self.n_bytes += size
                self.progress(size)
                if problem:
                    self._add(*problem, array=array, shard=shard)

    def _hash(self, name: str, blake3: str) -> tuple[int, tuple[Kind, str, str] | None]:
        """Return the size of an object, and what is wrong with it."""
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            return 0, ("missing", name, "the file is missing")
        except StoreError as error:
            return 0, ("damaged", name, str(error))
        if content_hash(data) != blake3:
            return len(data), ("damaged", name, "its hash differs from its record")
        return len(data), None

    def _disown(self, modality: Modality, name: str) -> None:
        """Account for the objects of an array whose fingerprint is lost: they are not foreign."""
        for folder in (array_folder(modality, name), records_folder(modality, name)):
            self.known.update(_objects(self.files, folder))

    def _disown_shard(self, record: ArrayRecord, shard: int) -> None:
        self.known.update(shard_objects(record, shard))

    def _add(
        self,
        problem_kind: Kind,
        name: str,
        detail: str,
        array: tuple[Modality, str] | None = None,
        shard: int | None = None,
    ) -> None:
        self.problems.append(
            Problem(kind=problem_kind, object=name, detail=detail, array=array, shard=shard)
        )


def shard_objects(record: ArrayRecord, shard: int) -> Iterator[str]:
    """Yield the name of every object that a shard may have."""
    for part_name in record.layout.parts:
        yield chunk_name(record, part_name, shard)
    yield quarantine_name(record.modality, record.name, shard)
