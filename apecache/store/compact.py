"""Free what no view needs: rows of removed views, blocks without a view, and leftovers.

The rows that views need are copied into one new block, and each view is committed again on it, the
newest one first. Only then are the old views and blocks removed. So a reader always finds the
newest view whole, and an interrupted compaction is finished, or undone, by the next one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath
from apecache.fingerprint import Modality, digest_strings
from apecache.storage.files import Files
from apecache.storage.open import as_files
from apecache.store.array import FeatureArray
from apecache.store.gather import ViewArray, gathered_scaled
from apecache.store.layout import (
    SEGMENTS,
    SOURCE,
    VIEWS,
    ZARR,
    ArrayRecord,
    segment_record_name,
    with_metadata,
)
from apecache.store.maintenance import recorded_arrays, remove_array, require_store
from apecache.store.reader import FeatureStore, is_free
from apecache.store.records import read_record
from apecache.store.table import PairTable, join_tables, read_contents, read_table
from apecache.store.views import (
    BlockReference,
    View,
    ViewRecord,
    commit_view,
    draft_view,
    open_view,
    read_view_record,
    remove_view,
    settle_view,
    view_ids,
    view_number,
)
from apecache.store.writer import (
    ArrayWriter,
    PairColumns,
    QuarantinedRow,
    add_segment,
    create_array,
)

MODALITIES: tuple[Modality, ...] = ("image", "text")


@dataclass(frozen=True, kw_only=True)
class CompactReport:
    """Say what a compaction freed."""

    n_rows: int
    """Rows of images and captions that no view needed."""
    n_bytes: int
    """Bytes of all objects before, less those after."""
    blocks: tuple[str, ...]
    """Folders of the removed blocks."""


def compact_store(store: Files | AnyPath, version: str | None = None) -> CompactReport:
    """Free what no view needs.

    Nobody else may write to the store meanwhile, unless it has file locks.

    Args:
        store: The store: a folder, or a URL of object storage.
        version: Version of apecache, for Zarr's attributes; None: the one that is installed.

    Raises:
        StoreError: There is not a store.
        IncompleteError: Features of a view are not complete.
        DamagedError: The store is damaged.
    """
    files = as_files(store)
    require_store(files)
    version = version or metadata.version("apecache")
    before = sum(files.sizes("").values())
    # Without views every row of the store is in use.
    ids = view_ids(files)
    if not ids:
        return CompactReport(n_rows=0, n_bytes=0, blocks=())
    # First what an interrupted run left: views that are not durable yet, and copies of views,
    # which would keep their rows twice.
    for view_id in ids:
        settle_view(files, view_id)
    _settle_copies(files)
    views = [open_view(files, view_id) for view_id in view_ids(files)]
    layout = _BlockRows(files, views)
    used = {modality: layout.used(modality) for modality in MODALITIES}
    # Rows are copied only if that frees some.
    n_unused = sum(layout.n_rows(name) - len(rows) for name, rows in used.items())
    if n_unused:
        block = _copy_rows(layout, used, version)
        _commit_again(files, views, layout, used, block)
        # The new views are committed by now: a crash in between loses nothing.
        for view in views:
            remove_view(files, view.record.view)
    removed = _remove_unused(files)
    after = sum(files.sizes("").values())
    return CompactReport(n_rows=n_unused, n_bytes=before - after, blocks=tuple(removed))


def _settle_copies(files: Files) -> None:
    """Finish an interrupted compaction that has committed every view again; else undo it.

    Its block stays, and is used again.
    """
    records = {view_id: read_view_record(files, view_id) for view_id in view_ids(files)}
    copies = {view_id: record for view_id, record in records.items() if _is_copy(record, records)}
    originals = {record.parent for record in copies.values()}
    # Of some copies the original is removed already: those lie on the same new block.
    new_blocks = {record.blocks for record in copies.values()}
    is_complete = all(
        view_id in originals or record.blocks in new_blocks for view_id, record in records.items()
    )
    for view_id in records:
        # The oldest first, so that the newest view stays the newest.
        if view_id in (originals if is_complete else copies):
            remove_view(files, view_id)


def _is_copy(record: ViewRecord, records: Mapping[str, ViewRecord]) -> bool:
    """Return whether a view is another one, which is still there, committed on a new block."""
    original = records.get(record.parent)
    if original is None or len(record.blocks) != 1:
        return False
    # A view and its copy have one digest and one name.
    return (original.digest, original.name) == (record.digest, record.name)


class _BlockRows:
    """Count the rows of all blocks that views refer to, one block after another."""

    def __init__(self, files: Files, views: Sequence[View]) -> None:
        self.files = files
        self.views = views
        references: dict[str, BlockReference] = {}
        for view in views:
            references.update({block.folder: block for block in view.record.blocks})
        self.references = [references[folder] for folder in sorted(references)]
        self.stores = [_block(files, reference.folder) for reference in self.references]

    def n_rows(self, modality: Modality) -> int:
        return sum(reference.rows(modality) for reference in self.references)

    def rows_of(self, view: View, modality: Modality) -> NDArray[np.int64]:
        """Return the row in all blocks of each row of a view; -1 where it has none."""
        first_rows: dict[str, int] = {}
        first = 0
        for reference in self.references:
            first_rows[reference.folder] = first
            first += reference.rows(modality)
        numbers: list[NDArray[np.int64]] = []
        for block in view.record.blocks:
            begin = first_rows[block.folder]
            numbers.append(np.arange(begin, begin + block.rows(modality)))
        # Index -1 finds the appended -1, so missing rows stay missing.
        rows: NDArray[np.int64] = np.append(np.concatenate(numbers), -1)
        return rows[view.content_rows(modality)]

    def used(self, modality: Modality) -> NDArray[np.int64]:
        """Return the rows that any view needs, in order."""
        rows = [self.rows_of(view, modality) for view in self.views]
        needed = np.unique(np.concatenate(rows))
        return needed[needed >= 0]

    def arrays(self, modality: Modality) -> list[FeatureArray]:
        """Return the arrays of all blocks together."""
        first, *later = self.stores
        return FeatureStore(first.files, tuple(later)).arrays(modality)

    def table(self) -> PairTable:
        """Return the tables of all blocks, joined; captions without an image have the row -1."""
        tables = [read_table(store.files) for store in self.stores]
        joined = join_tables(tables, "")
        without_image = np.concatenate([table.image_rows < 0 for table in tables])
        joined.image_rows[without_image] = -1
        return joined


def _block(files: Files, folder: str) -> FeatureStore:
    return FeatureStore.block(files.child(folder) if folder else files)


def _copy_rows(
    layout: _BlockRows,
    used: dict[Modality, NDArray[np.int64]],
    version: str,
) -> BlockReference:
    """Copy rows of all blocks into a new one."""
    columns = _columns(layout, used)
    folder = _free_folder(layout.files, columns.digest)
    name = folder.removeprefix(f"{SEGMENTS}/")
    root = str(read_record(layout.files, SOURCE)["root"])
    add_segment(layout.files, name, pairs=columns, root=root, version=version)
    target = layout.files.child(folder)
    for modality in MODALITIES:
        for array in layout.arrays(modality):
            _copy_array(target, array, used[modality], columns.digest, layout.views[0])
    return BlockReference(
        folder=folder,
        digest=columns.digest,
        n_images=len(columns.keys),
        n_texts=len(columns.captions),
    )


def _columns(layout: _BlockRows, used: dict[Modality, NDArray[np.int64]]) -> PairColumns:
    table = layout.table()
    images = used["image"]
    texts = used["text"]
    contents: list[str] = []
    for store in layout.stores:
        contents += read_contents(store.files)
    # An encoder may have hashed images that were not hashed when the block was made.
    for array in layout.arrays("image"):
        contents = [
            known_content or new
            for known_content, new in zip(contents, array.content(), strict=True)
        ]
    keys = table.keys[images].tolist()
    captions = table.captions[texts].tolist()
    # One more entry than rows: captions without an image look up -1, the last one.
    new_row = np.full(len(table.keys) + 1, -1, np.int64)
    new_row[images] = np.arange(len(images))
    kept_contents = [contents[row] for row in images.tolist()]
    return PairColumns(
        keys=keys,
        # Splits and labels are those of the views, which keep them.
        splits=[""] * len(keys),
        labels=[""] * len(keys),
        captions=captions,
        languages=table.languages[texts].tolist(),
        image_rows=new_row[table.image_rows[texts]].tolist(),
        digest=digest_strings(["compact", *keys, *kept_contents, *captions]),
        origin=str(read_record(layout.files, SOURCE)["origin"]),
        contents=kept_contents,
    )


def _free_folder(files: Files, digest: str) -> str:
    """Return the folder of the new block, which an interrupted compaction may have begun."""
    number = 1
    while True:
        folder = f"{SEGMENTS}/{number:04d}"
        is_begun = files.exists(f"{folder}/{SOURCE}")
        if is_begun and read_record(files.child(folder), SOURCE)["digest"] == digest:
            return folder
        if not is_begun and is_free(files, folder):
            return folder
        number += 1


def _copy_array(
    target: Files,
    array: FeatureArray,
    rows: NDArray[np.int64],
    digest: str,
    view: View,
) -> None:
    """Copy rows of an array, shard by shard, as an extraction commits them."""
    layout = replace(
        array.record.layout,
        rows=len(rows),
        tokens=array.tokens,
        # A shard is not larger than the array, nor empty.
        shard_rows=max(1, min(array.record.layout.shard_rows, len(rows))),
    )
    record: ArrayRecord = replace(array.record, layout=layout, table=digest, metadata={})
    record = with_metadata(record)
    create_array(target, record)
    writer = ArrayWriter(target, record)
    content = array.content()
    lengths = array.load_lengths()
    # Rows that could not be encoded stay so: their reasons move along.
    bad = {row["row"]: row for row in array.quarantined()}
    for shard in writer.pending():
        shard_range = layout.shard(shard)
        shard_rows = rows[shard_range.start : shard_range.stop]
        features, scales = _stored_features(array, shard_rows, view)
        quarantined: list[QuarantinedRow] = []
        for new_row, row in zip(shard_range, shard_rows.tolist(), strict=True):
            if row in bad:
                described: dict[str, Any] = {**bad[row], "row": new_row}
                quarantined.append(QuarantinedRow(**described))
        writer.commit(
            shard,
            features=features,
            content=[content[row] for row in shard_rows.tolist()],
            quarantined=quarantined,
            lengths=None if lengths is None else lengths[shard_rows],
            scales=scales,
        )
    writer.seal()


def _stored_features(
    array: FeatureArray,
    rows: NDArray[np.int64],
    view: View,
) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
    """Return rows of an array as they are stored, and the scales of int8."""
    if array.record.layout.scaled:
        return gathered_scaled(array, rows)
    gathered = ViewArray(
        files=array.files,
        record=array.record,
        appended=array.appended,
        rows_to_come=array.rows_to_come,
        view=view,
        index=rows,
    )
    return gathered.load(), None


def _commit_again(
    files: Files,
    views: Sequence[View],
    layout: _BlockRows,
    used: dict[Modality, NDArray[np.int64]],
    block: BlockReference,
) -> None:
    """Commit all views on the new block; the newest one first, so that it stays the newest."""
    last = view_number(views[-1].record.view)
    # The numbers follow the age of the views, whatever the order of commits.
    for position in reversed(range(len(views))):
        view = views[position]
        content_rows: dict[Modality, NDArray[np.int64]] = {}
        for modality in MODALITIES:
            rows = layout.rows_of(view, modality)
            new_rows = np.searchsorted(used[modality], rows)
            content_rows[modality] = np.where(rows < 0, -1, new_rows)
        record = replace(
            view.record,
            parent=view.record.view,
            blocks=(block,),
            in_order=(),
            objects={},
        )
        draft = draft_view(view.table, content_rows, view.problems.tolist(), record)
        commit_view(files, draft, number=last + 1 + position)


def _remove_unused(files: Files) -> list[str]:
    """Remove blocks, features and objects that no view refers to."""
    # Only what no view names is removed, so an interrupted removal can begin again.
    ids = view_ids(files)
    files.remove_temporary("records", ZARR, VIEWS)
    for name in files.list(SEGMENTS):
        files.child(f"{SEGMENTS}/{name}").remove_temporary("records", ZARR)
    with files.exclusive("records"):
        used: set[str] = set()
        for view_id in ids:
            used.update(block.folder for block in read_view_record(files, view_id).blocks)
        for folder in files.list(VIEWS):
            if folder not in ids:
                files.remove_folder(f"{VIEWS}/{folder}")
        removed: list[str] = []
        # Also blocks without a record, which an interrupted run has left.
        for name in files.list(SEGMENTS):
            folder = f"{SEGMENTS}/{name}"
            if folder not in used:
                _remove_block(files, folder)
                removed.append(folder)
        if "" not in used and recorded_arrays(files):
            # The store itself stays, without features.
            for modality, name in recorded_arrays(files):
                remove_array(files, modality, name)
            removed.insert(0, "")
    return removed


def _remove_block(files: Files, folder: str) -> None:
    """Remove a block; while it has features, its record in the store stays."""
    block = files.child(folder)
    for modality, name in recorded_arrays(block):
        remove_array(block, modality, name)
    files.remove(segment_record_name(folder.removeprefix(f"{SEGMENTS}/")))
    files.remove_folder(folder)
