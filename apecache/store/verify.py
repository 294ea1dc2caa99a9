"""Verification: every object of a store against its record, and everything that no record knows."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

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
from apecache.store.records import CommitRecord, digest_commits, is_commit, read_commit, read_record

Kind = Literal["damaged", "missing", "unsealed", "uncommitted", "temporary", "foreign"]
HARMFUL: tuple[Kind, ...] = ("damaged", "missing")
Progress = Callable[[int], None]
"""Called with the number of bytes of every object that was hashed."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`object` is a path below the store. `array` (modality, name) and `shard` say what it is part
    of, if anything.

    damaged, missing: what a record promises is not there. unsealed: all shards are committed, but
    the seal is not there (a run was killed just before its end): nothing is served until it is.
    uncommitted: chunks of a shard without a record (a killed run's; the next run writes them
    again). temporary: left by a killed writer. foreign: not ours.
    """

    kind: Kind
    object: str
    detail: str
    array: tuple[Modality, str] | None = None
    shard: int | None = None

    @property
    def harmful(self) -> bool:
        return self.kind in HARMFUL


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """`n_objects` objects of `n_bytes` were read and hashed."""

    store: str | Path
    n_objects: int
    n_bytes: int
    problems: tuple[Problem, ...]

    @property
    def sound(self) -> bool:
        return not any(problem.harmful for problem in self.problems)


def verify_store(
    path: str | Path,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """Read and hash everything, appended segments too.

    Raises:
        StoreError: there is no store at `path`, or one of a newer format.
    """
    return verify_files(open_files(path), progress, threads)


def verify_files(
    files: Files,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """As `verify_store`."""
    own = verify_segment(files, progress, threads)
    own = replace(own, problems=(*own.problems, *_segment_problems(files)))
    segments = begun_segments(files)
    return _with_segments(
        own,
        {name: verify_segment(files.child(name), progress, threads) for name in segments},
    )


def verify_segment(
    files: Files,
    progress: Progress = lambda _: None,
    threads: int | None = None,
) -> VerifyReport:
    """One segment alone (the store itself is the first). Raises as `verify_store` does."""
    if not files.exists(SOURCE) and not files.exists(PAIRS):
        raise StoreError(f"{files.place} is no store (make one with: apecache extract)")
    check = _Check(files, progress, threads)
    check.table()
    for modality, name in array_names(files):
        check.array(modality, name)
    check.strangers()
    return VerifyReport(
        store=files.place,
        n_objects=check.n_objects,
        n_bytes=check.n_bytes,
        problems=tuple(check.problems),
    )


def _segment_problems(files: Files) -> Iterator[Problem]:
    """Segments against their records in the store: lost ones, swapped ones, and those that no
    record knows."""
    there = {folder.rpartition("/")[2] for folder in begun_segments(files)}
    recorded = {name.removesuffix(".json") for name in files.list(SEGMENT_RECORDS)}
    for segment in sorted(there | recorded):
        name = segment_record_name(segment)
        own = files.child(f"{SEGMENTS}/{segment}")
        if segment not in there:
            yield Problem(
                kind="missing",
                object=f"{SEGMENTS}/{segment}",
                detail="a segment that was appended is not there",
            )
            continue
        if segment not in recorded:
            if any(
                name.count("/") == 3 and name.endswith(".json") for name in own.sizes("records")
            ):
                yield Problem(
                    kind="missing",
                    object=name,
                    detail="the segment has no record in the store",
                )
            continue
        try:
            wanted = read_record(files, name)
            found = read_record(own, SOURCE)
        except DamagedError as error:
            if not files.exists(name) or name in str(error):
                yield Problem(kind="damaged", object=name, detail=str(error))
            continue
        if wanted["digest"] != found["digest"]:
            yield Problem(
                kind="damaged",
                object=f"{SEGMENTS}/{segment}",
                detail="not the segment that was appended in its place",
            )


def _with_segments(own: VerifyReport, segments: Mapping[str, VerifyReport]) -> VerifyReport:
    """One report; the objects of a segment are named from the store's root."""
    problems = list(own.problems)
    for folder, report in segments.items():
        problems += [
            replace(problem, object=f"{folder}/{problem.object}") for problem in report.problems
        ]
    n_objects = own.n_objects + sum(report.n_objects for report in segments.values())
    n_bytes = own.n_bytes + sum(report.n_bytes for report in segments.values())
    return VerifyReport(
        store=own.store,
        n_objects=n_objects,
        n_bytes=n_bytes,
        problems=tuple(problems),
    )


def begun_segments(files: Files) -> list[str]:
    """Folders of the appended segments that anything is left of, in order."""
    folders = [f"{SEGMENTS}/{name}" for name in files.list(SEGMENTS)]
    return [
        folder
        for folder in folders
        if any(name.endswith(".json") for name in files.list(f"{folder}/records"))
    ]


def array_names(files: Files) -> list[tuple[Modality, str]]:
    """Every array that has records, or data, images first; not one that a killed writer had only
    made a folder for."""
    kinds: tuple[Modality, ...] = ("image", "text")
    return [
        (kind, name)
        for kind in kinds
        for name in sorted(
            {*files.list(f"records/{kind}"), *files.list(f"{ZARR}/{kind}")} - {"zarr.json"}
        )
        if any(_objects(files, records_folder(kind, name)))
        or any(_objects(files, array_folder(kind, name)))
    ]


def _objects(files: Files, folder: str) -> Iterator[str]:
    """Every file below a folder that is not a temporary one."""
    return (name for name in files.sizes(folder) if not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.rpartition("/")[2].startswith(TEMPORARY)


class _Check:
    """One pass over a store: collects problems, and the names of all objects that something
    accounts for."""

    def __init__(self, files: Files, progress: Progress, threads: int | None) -> None:
        self.files = files
        self.progress = progress
        self.threads = threads or files.readers
        self.problems: list[Problem] = []
        self.known: set[str] = {SOURCE, PAIRS, "README.md"}
        self.known.update(f"{SEGMENT_RECORDS}/{name}" for name in files.list(SEGMENT_RECORDS))
        self.n_objects = self.n_bytes = 0

    def table(self) -> None:
        """The pair table, Zarr's metadata of the root, and the README."""
        source = self._record(SOURCE)
        pairs = self._record(PAIRS)
        if source and pairs and source.get("digest") != pairs.get("digest"):
            self._add("damaged", PAIRS, f"belongs to another table than {SOURCE}")
        hashes = {
            name: entry["blake3"] for name, entry in (pairs or {"objects": {}})["objects"].items()
        }
        hashes["README.md"] = content_hash(README)
        self._hash_all([(name, wanted, None) for name, wanted in hashes.items()])
        if pairs is None:  # what it named is no stranger
            self.known.update(_objects(self.files, f"{ZARR}/pairs"))
            self.known.update(f"{ZARR}/{group}zarr.json" for group in ("", "image/", "text/"))

    def array(self, modality: Modality, name: str) -> None:
        array = (modality, name)
        where = f"{records_folder(modality, name)}/fingerprint.json"
        value = self._record(where, array)
        try:
            record = ArrayRecord.from_json(modality, name, value) if value else None
        except StoreError as error:
            self._add("damaged", name=where, detail=str(error), array=array)
            record = None
        source = self._record(SOURCE)
        if record and source and record.table != source["digest"]:
            self._add("damaged", name=where, detail="an array of another table", array=array)
        if record is None:
            self._disown(modality, name)
            return
        folder = array_folder(modality, name)
        self._hash_all(
            [(f"{folder}/{path}", content_hash(t), None) for path, t in record.metadata.items()],
            array,
        )
        commits, hashes = self._commits(record)
        self._seal(record, commits, hashes)
        self._uncommitted(record, commits)

    def strangers(self) -> None:
        """Whatever lies below the store and is not accounted for; segments account for
        themselves."""
        segments = begun_segments(self.files)
        for name in self.files.sizes(""):
            if name in self.known or any(name.startswith(f"{folder}/") for folder in segments):
                continue
            if _is_temporary(name):
                self._add("temporary", name, "left by a killed run")
            else:
                self._add("foreign", name, "not ours")

    def _commits(self, record: ArrayRecord) -> tuple[dict[int, CommitRecord], list[str]]:
        """Valid records by shard, and the hash of each, after hashing everything that they name."""
        found: dict[int, CommitRecord] = {}
        hashes = []
        files = filter(
            is_commit,
            self.files.list(f"{records_folder(record.modality, record.name)}/commits"),
        )
        shards = [int(file.removesuffix(".json")) for file in files]
        with ThreadPoolExecutor(self.threads) as pool:
            read = pool.map(lambda shard: self._commit(record, shard), shards)
            for shard, commit in zip(shards, read, strict=True):
                name = commit_name(record.modality, record.name, shard)
                self.known.add(name)
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
                    found[shard], of = commit
                    hashes.append(of)
        entries = (
            (shard, entry) for shard, commit in found.items() for entry in commit.objects.items()
        )
        objects = [(name, entry.blake3, shard) for shard, (name, entry) in entries]
        self._hash_all(objects, (record.modality, record.name))
        return found, hashes

    def _commit(self, record: ArrayRecord, shard: int) -> tuple[CommitRecord, str] | ApecacheError:
        """A record without what is long in it, and its hash; or what is wrong with it."""
        try:
            commit, of = read_commit(self.files, record, shard)
        except ApecacheError as error:
            return error
        return commit.without_content(), of

    def _seal(
        self,
        record: ArrayRecord,
        commits: Mapping[int, CommitRecord],
        hashes: Sequence[str],
    ) -> None:
        """A sealed array must have exactly the records that were sealed."""
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
        """Chunks that a killed run wrote before it could commit them."""
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
        self.known.add(name)
        try:
            return read_record(self.files, name)
        except DamagedError as error:
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
        """`objects`: (name, the hash it should have, the shard it is of)."""
        self.known.update(name for name, *_ in objects)
        with ThreadPoolExecutor(self.threads) as pool:
            found = pool.map(lambda item: self._hash(*item[:2]), objects)
            for (*_, shard), (size, problem) in zip(objects, found, strict=True):
                self.n_objects += 1
                self.n_bytes += size
                self.progress(size)
                if problem:
                    self._add(*problem, array=array, shard=shard)

    def _hash(self, name: str, wanted: str) -> tuple[int, tuple[Kind, str, str] | None]:
        """Size of an object, and what is wrong with it."""
        try:
            data = self.files.read(name)
        except FileNotFoundError:
            return 0, ("missing", name, "the file is missing")
        except StoreError as error:
            return 0, ("damaged", name, str(error))
        same = content_hash(data) == wanted
        return len(data), None if same else ("damaged", name, "its hash differs from its record")

    def _disown(self, modality: Modality, name: str) -> None:
        """An array whose fingerprint is lost: its other objects are not strangers."""
        for folder in (array_folder(modality, name), records_folder(modality, name)):
            self.known.update(_objects(self.files, folder))

    def _disown_shard(self, record: ArrayRecord, shard: int) -> None:
        self.known.update(shard_objects(record, shard))

    def _add(
        self,
        kind: Kind,
        name: str,
        detail: str,
        array: tuple[Modality, str] | None = None,
        shard: int | None = None,
    ) -> None:
        self.problems.append(
            Problem(kind=kind, object=name, detail=detail, array=array, shard=shard)
        )


def shard_objects(record: ArrayRecord, shard: int) -> Iterator[str]:
    """Every object that a shard may have."""
    for part in record.layout.parts:
        yield chunk_name(record, part, shard)
    yield quarantine_name(record.modality, record.name, shard)
