"""Find the contents that a store holds, and those that a table has."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from apecache.data.media import FolderMedia, NoMedia, TarMedia
from apecache.data.pairs import PairSource
from apecache.errors import DamagedError, MismatchError
from apecache.extraction.stamps import (
    FileStamps,
    StampTable,
    hash_files,
    read_stamps,
    stamp_files,
)
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.store.layout import PAIRS, SEGMENTS, ArrayRecord
from apecache.store.reader import FeatureStore, has_arrays, segment_names
from apecache.store.records import read_commit, read_commits
from apecache.store.table import PairTable, read_contents, read_table
from apecache.store.views import BlockReference

SEEN = "-"
"""Stands for the content of a file that is as it was when its row was planned."""


@dataclass(frozen=True, kw_only=True)
class StoredBlock:
    """Hold the contents of one block."""

    folder: str
    store: FeatureStore
    tolerant: bool = False
    """Whether damaged commit records are passed over; repair makes their shards again."""

    @cached_property
    def table(self) -> PairTable:
        return read_table(self.store.files)

    @property
    def reference(self) -> BlockReference:
        source = self.store.block_source
        return BlockReference(
            folder=self.folder,
            digest=source["digest"],
            n_images=source["n_images"],
            n_texts=source["n_texts"],
        )

    @cached_property
    def declared(self) -> list[str]:
        """Return the hash of each image that was known when the block was made."""
        return read_contents(self.store.files)

    @cached_property
    def contents(self) -> list[str | None]:
        """Return the hash of each image.

        It is empty where the image could not be read, None where it is not known yet.
        """
        contents: list[str | None] = [None] * len(self.declared)
        for array in self.store.arrays("image"):
            for row, digest in self._committed(array.record):
                # Where one encoder failed on an image, another may have read it.
                contents[row] = contents[row] or digest
        return [
            (declared or None) if content is None else content
            for content, declared in zip(contents, self.declared, strict=True)
        ]

    def _committed(self, record: ArrayRecord) -> list[tuple[int, str]]:
        rows: list[tuple[int, str]] = []
        files = self.store.files
        if not self.tolerant:
            for commit, _ in read_commits(files, record):
                rows += enumerate(commit.content, commit.rows[0])
            return rows
        for shard in range(record.layout.n_shards):
            with contextlib.suppress(FileNotFoundError, DamagedError, MismatchError):
                commit, _ = read_commit(files, record, shard)
                rows += enumerate(commit.content, commit.rows[0])
        return rows

    def bad_rows(self, modality: Modality) -> set[int]:
        """Return the rows that any array could not encode."""
        rows: set[int] = set()
        for array in self.store.arrays(modality):
            if array.n_quarantined:
                rows.update(row["row"] for row in array.quarantined())
        return rows


def stored_blocks(files: Files) -> list[StoredBlock]:
    """Open all blocks of a store that were made completely, in order."""
    if not files.exists(PAIRS):
        return []
    blocks = [StoredBlock(folder="", store=FeatureStore.block(files))]
    for name in segment_names(files):
        folder = f"{SEGMENTS}/{name}"
        blocks.append(
            StoredBlock(folder=folder, store=FeatureStore.block(files.child(folder))),
        )
    # A compaction has left the table of the first block, but none of its features.
    if not has_arrays(files) and any(has_arrays(block.store.files) for block in blocks[1:]):
        return blocks[1:]
    return blocks


@dataclass(frozen=True, kw_only=True)
class TableContents:
    """Hold what the images of a table are now."""

    stamps: FileStamps
    contents: list[str | None]
    """For each image its hash, an empty text where it cannot be read, SEEN where its file has not
    changed since it was planned, None where nothing is known."""
    recorded: list[bool]
    """Whether an earlier extraction has seen the file."""
    problems: dict[int, str] = field(default_factory=dict)
    """Why images cannot be read, by row."""


def table_contents(
    source: PairSource,
    files: Files,
    hashed: bool,
    recheck: bool = False,
    again: Sequence[int] = (),
) -> TableContents:
    """Look at the images of a table; those that changed are hashed.

    Args:
        source: The table.
        files: The store, which has the stamps of the last extraction.
        hashed: Whether contents are needed; else only files are looked at.
        recheck: Whether all images are hashed, except unreadable ones that have not changed.
        again: Rows to be hashed whatever their stamps say.
    """
    stamps = stamp_files(source.media, source.keys)
    if isinstance(source.media, NoMedia):
        nothing: list[str | None] = [None] * len(source)
        return TableContents(stamps=stamps, contents=nothing, recorded=[False] * len(source))
    table: StampTable = read_stamps(files)
    contents = table.find(source.keys, stamps)
    known_keys = table.has(source.keys)
    problems: dict[int, str] = {}
    if hashed:
        forced = set(again)
        unknown = [
            row
            for row, content in enumerate(contents)
            if content is None or (recheck and content != "") or row in forced
        ]
        _hash(source, rows=unknown, contents=contents, problems=problems)
    return TableContents(
        stamps=stamps,
        contents=contents,
        recorded=known_keys,
        problems=problems,
    )


def equal_contents(source: PairSource) -> TableContents:
    """Look at the images of a new store; only files of equal size are hashed."""
    stamps = stamp_files(source.media, source.keys)
    contents: list[str | None] = [None] * len(source)
    if isinstance(source.media, FolderMedia | TarMedia):
        _, inverse, size_counts = np.unique(stamps.sizes, return_inverse=True, return_counts=True)
        same_size_rows: NDArray[np.int64] = np.flatnonzero(
            (size_counts[inverse] > 1) & (stamps.sizes > 0)
        )
        _hash(source, rows=same_size_rows.tolist(), contents=contents, problems={})
    return TableContents(stamps=stamps, contents=contents, recorded=[False] * len(source))


def _hash(
    source: PairSource,
    rows: Sequence[int],
    contents: list[str | None],
    problems: dict[int, str],
) -> None:
    """Hash the images of some rows into `contents`, and say why others cannot be read."""
    keys = [source.keys[row] for row in rows]
    for row, (digest, problem) in zip(rows, hash_files(source.media, keys), strict=True):
        contents[row] = digest
        if problem:
            problems[row] = problem
