"""Make lost tables of a store again: those of its blocks, and its views.

Each says something about the others. What is made again is used only if its digest, or its hash, is
the recorded one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.data.pairs import PairSource
from apecache.data.recorded import options_to_record
from apecache.errors import DamagedError, DataError, MismatchError, StoreError
from apecache.extraction.contents import StoredBlock, TableContents, stored_blocks, table_contents
from apecache.extraction.kept_columns import with_columns_of
from apecache.extraction.matching import Matching
from apecache.extraction.segments import BlockInputs, pair_columns
from apecache.extraction.spec import ExtractSpec
from apecache.extraction.stamps import read_stamps, stamp_table, write_stamps
from apecache.extraction.table_plan import (
    block_columns,
    block_table,
    new_store_plan,
    stored_inputs,
    table_view,
)
from apecache.fingerprint import Modality, content_hash
from apecache.storage.files import Files
from apecache.store.layout import (
    CONTENT_COLUMN,
    PAIRS,
    SEGMENT_RECORDS,
    SEGMENTS,
    SOURCE,
    STAMPS,
    VIEW_RECORDS,
    VIEWS,
    ZARR,
    segment_record_name,
    view_folder,
    view_record_name,
)
from apecache.store.maintenance import restore_claim, restore_segment_records, restore_source
from apecache.store.reader import FeatureStore
from apecache.store.records import parse_record, read_record
from apecache.store.table import PairTable, join_tables
from apecache.store.verify import array_names, begun_segments
from apecache.store.verify_views import check_views
from apecache.store.views import (
    COPY,
    VIEW_ID,
    BlockReference,
    View,
    draft_view,
    open_view,
    parse_view,
    read_view_record,
    view_ids,
    view_payloads,
)
from apecache.store.writer import PairColumns


def below(folder: str, name: str) -> str:
    """Return an object's name within the store; `folder` is that of its block."""
    return f"{folder}/{name}" if folder else name


@dataclass(frozen=True, kw_only=True)
class LostTables:
    """Make lost tables again from the user's table and from what is left."""

    files: Files
    source: PairSource

    def folders(self) -> list[str]:
        """Return the folders of all blocks that are recorded anywhere, in order."""
        # Records, views and folders may each be lost: a block counts if any of them names it.
        recorded = {
            f"{SEGMENTS}/{name.removesuffix('.json')}" for name in self.files.list(SEGMENT_RECORDS)
        }
        for view_id in view_ids(self.files):
            recorded.update(block.folder for block in read_view_record(self.files, view_id).blocks)
        return sorted({"", *begun_segments(self.files), *recorded})

    @cached_property
    def contents(self) -> TableContents:
        """Return the hash of each image of the user's table."""
        return table_contents(
            self.source,
            files=self.files,
            hashed=True,
            again=range(len(self.source)),
        )

    # --- records of blocks ------------------------------------------------------------------------

    def mend_sources(self) -> list[str]:
        """Write lost source records and segment records again, and return their names."""
        mended: list[str] = []
        for folder in self.folders():
            files = self.files.child(folder)
            try:
                read_record(files, SOURCE)
            except DamagedError:
                self._mend_source(folder)
                mended.append(below(folder, SOURCE))
        names = [folder.rpartition("/")[2] for folder in self.folders() if folder]
        return mended + restore_segment_records(self.files, names)

    def _mend_source(self, folder: str) -> None:
        files = self.files.child(folder)
        identity = self._identity(folder)
        # Without any record of the block its table is computed anew from the user's source.
        if identity is None:
            columns = self.columns(folder, self._recorded_digest(folder))
            restore_source(files, columns, self.source.media.place)
        else:
            restore_claim(
                files,
                identity=identity,
                origin=self.source.origin,
                root=self.source.media.place,
                # A block that only views refer to has no table of its own.
                options={} if "view_only" in identity else options_to_record(self.source),
            )

    def _identity(self, folder: str) -> dict[str, Any] | None:
        """Return what the store or a view says of a block; None if nothing is left."""
        if folder:
            # The record of the segment may be lost too; then a view is asked.
            with contextlib.suppress(DamagedError):
                name = segment_record_name(folder.rpartition("/")[2])
                record = read_record(self.files, name)
                keys = ("digest", "n_images", "n_texts", "view_only")
                return {key: record[key] for key in keys if key in record}
        reference = self._reference(folder)
        if reference is None:
            return None
        identity: dict[str, Any] = {
            "digest": reference.digest,
            "n_images": reference.n_images,
            "n_texts": reference.n_texts,
        }
        declares = self.files.exists(below(folder, f"{ZARR}/pairs/{CONTENT_COLUMN}/zarr.json"))
        return {**identity, "view_only": True} if declares else identity

    def _reference(self, folder: str) -> BlockReference | None:
        for view_id in view_ids(self.files):
            for block in read_view_record(self.files, view_id).blocks:
                if block.folder == folder:
                    return block
        return None

    def _recorded_digest(self, folder: str) -> str | None:
        """Return the digest of a block's table, from any of its records."""
        files = self.files.child(folder)
        with contextlib.suppress(DamagedError):
            return str(read_record(files, PAIRS)["digest"])
        for modality, name in array_names(files):
            with contextlib.suppress(DamagedError):
                record = read_record(files, f"records/{modality}/{name}/fingerprint.json")
                return str(record["table"])
        return None

    # --- tables of blocks -------------------------------------------------------------------------

    def columns(self, folder: str, digest: str | None) -> PairColumns:
        """Return the table of a block.

        Args:
            folder: The block.
            digest: Digest that the table must have; None if no record is left that says it.

        Raises:
            MismatchError: It cannot be made again.
        """
        for columns in self._candidates(folder):
            if digest in (None, columns.digest):
                return columns
        raise MismatchError(
            f"the table of {self.files.where(folder)} is lost, and {self.source.origin} is not the "
            "table that it was made from; give that one with --pairs, or restore the files"
        )

    def _candidates(self, folder: str) -> Iterator[PairColumns]:
        """Yield tables that a block may have had."""
        files = self.files.child(folder)
        # Another object than the table itself may be lost.
        with contextlib.suppress(DataError, StoreError):
            yield block_columns(StoredBlock(folder=folder, store=FeatureStore.block(files)))
        # A store that was made in one go has the user's whole table in its first block.
        if not folder:
            yield pair_columns(self.source)
        yield from self._parts(folder)
        if not folder:
            plan = new_store_plan(self.source, self.files, ExtractSpec(retry=True))
            yield pair_columns(plan.segments[0].part)
        for view_id in view_ids(self.files):
            with contextlib.suppress(DamagedError):
                view = open_view(self.files, view_id)
                yield from self._of_whole_view(view, folder)
                columns = self._of_view(view, folder)
                if columns is not None:
                    yield columns

    def _parts(self, folder: str) -> Iterator[PairColumns]:
        """Yield the rows of the user's table that a block has if all blocks are one table."""
        first = 0
        for other in self.folders():
            try:
                n_images = read_record(self.files.child(other), SOURCE)["n_images"]
            except DamagedError:
                return
            if other == folder:
                yield pair_columns(self.source.part(first, first + n_images))
            first += n_images

    def _of_whole_view(self, view: View, folder: str) -> Iterator[PairColumns]:
        """Yield the rows that a block has if the table of the blocks became this view."""
        first_image = 0
        first_text = 0
        for block in view.record.blocks:
            images = slice(first_image, first_image + block.n_images)
            texts = slice(first_text, first_text + block.n_texts)
            if block.folder == folder and set(view.record.in_order) == {"image", "text"}:
                table = view.table
                yield PairColumns(
                    keys=table.keys[images].tolist(),
                    splits=table.splits[images].tolist(),
                    labels=table.labels[images].tolist(),
                    captions=table.captions[texts].tolist(),
                    languages=table.languages[texts].tolist(),
                    image_rows=(table.image_rows[texts] - first_image).tolist(),
                    digest=block.digest,
                    origin=self.source.origin,
                    options=options_to_record(self.source),
                )
            first_image += block.n_images
            first_text += block.n_texts

    def _of_view(self, view: View, folder: str) -> PairColumns | None:
        """Return the table of a block whose rows all are rows of a view; else None."""
        images = _block_rows(view, "image", folder)
        texts = _block_rows(view, "text", folder)
        if images is None or texts is None:
            return None
        table = view.table
        hash_of_key = dict(zip(self.source.keys, self.contents.contents, strict=True))
        keys = [str(table.keys[row]) for row in images]
        contents = [hash_of_key.get(key) or "" for key in keys]
        content_rows = view.content_rows("image")
        first_row = _first_row(view, folder)
        owners = content_rows[table.image_rows[texts]] - first_row
        image_rows = np.where((owners >= 0) & (owners < len(images)), owners, -1).tolist()
        return block_table(
            keys=keys,
            contents=contents,
            captions=[str(table.captions[row]) for row in texts],
            languages=[str(table.languages[row]) for row in texts],
            image_rows=image_rows,
            origin=self.source.origin,
        )

    # --- what a repair encodes --------------------------------------------------------------------

    def inputs(self, folder: str) -> BlockInputs:
        """Return the inputs of a block: each image where the user's table has it now."""
        blocks = [replace(block, tolerant=True) for block in stored_blocks(self.files)]
        matching = Matching(source=self.source, blocks=blocks, newest=None, retry=False)
        rows = matching.rows(self.contents)
        block = next(block for block in blocks if block.folder == folder)
        inputs = stored_inputs(self.source, block, rows)
        contents = list(inputs.contents)
        for row, digest in self._remembered(folder).items():
            contents[row] = contents[row] or digest
        return replace(inputs, contents=contents)

    def _remembered(self, folder: str) -> dict[int, str]:
        """Return what each image of a block was at the last extraction, where that is recorded."""
        remembered: dict[int, str] = {}
        opened = FeatureStore.at(self.files)
        if opened.view is None:
            return remembered
        hashes = read_stamps(self.files).hashes([str(key) for key in opened.pairs.keys])
        first = _first_row(opened.view, folder)
        for row, digest in zip(opened.view.content_rows("image").tolist(), hashes, strict=True):
            if digest:
                remembered[row - first] = digest
        n_images = FeatureStore.block(self.files.child(folder)).block_source["n_images"]
        return {row: digest for row, digest in remembered.items() if 0 <= row < n_images}


def _first_row(view: View, folder: str) -> int:
    """Return the first image row of a block among the blocks of a view."""
    first = 0
    for block in view.record.blocks:
        if block.folder == folder:
            break
        first += block.n_images
    return first


def _block_rows(view: View, modality: Modality, folder: str) -> NDArray[np.int64] | None:
    """Return the first row of a view for each row of a block; None unless it has all of them."""
    first = 0
    for block in view.record.blocks:
        n_rows = block.rows(modality)
        if block.folder == folder:
            unique, rows = np.unique(view.content_rows(modality), return_index=True)
            inside = (unique >= first) & (unique < first + n_rows)
            return rows[inside] if int(inside.sum()) == n_rows else None
        first += n_rows
    return None


# --- views ----------------------------------------------------------------------------------------


def mend_view_records(files: Files) -> list[str]:
    """Write lost records of views again, from their copies, and return their names.

    Raises:
        StoreError: Both are lost.
    """
    mended: list[str] = []
    names = {name.removesuffix(".json") for name in files.list(VIEW_RECORDS)}
    for view_id in sorted(names | set(files.list(VIEWS))):
        copy = f"{view_folder(view_id)}/{COPY}"
        if not VIEW_ID.fullmatch(view_id) or not (view_id in names or files.exists(copy)):
            continue
        name = view_record_name(view_id)
        try:
            read_view_record(files, view_id)
        except DamagedError:
            data = files.read(copy) if files.exists(copy) else b""
            try:
                value = parse_record(data, copy)
                parse_view(value, view_id, copy)
            except DamagedError:
                raise StoreError(
                    f"{files.where(name)} and its copy are lost; restore one of them, or: "
                    f"apecache views remove STORE {view_id}"
                ) from None
            files.write(name, data)
            mended.append(name)
    return mended


def mend_views(tables: LostTables) -> list[str]:
    """Write lost columns and copies of views again, and return their names."""
    files = tables.files
    mended: list[str] = []
    # What is uncommitted was never promised, so there is nothing to mend.
    problems = [problem for problem in check_views(files).problems if problem.kind != "uncommitted"]
    for view_id in view_ids(files):
        folder = f"{view_folder(view_id)}/"
        names = [problem.object for problem in problems if problem.object.startswith(folder)]
        copy = f"{folder}{COPY}"
        if copy in names:
            files.write(copy, files.read(view_record_name(view_id)))
            mended.append(copy)
        lost = [name for name in names if name != copy]
        if lost:
            mended += _mend_columns(tables, view_id, lost)
    if any(problem.object == STAMPS for problem in problems):
        _mend_stamps(tables)
        mended.append(STAMPS)
    return mended


def _mend_columns(tables: LostTables, view_id: str, lost: Sequence[str]) -> list[str]:
    """Write objects of a view again where what they were can be told."""
    files = tables.files
    record = read_view_record(files, view_id)
    mended: set[str] = set()
    for view in _view_candidates(tables, view_id):
        for path, data in view_payloads(view).items():
            name = f"{view_folder(view_id)}{path}"
            recorded = record.objects.get(name, {}).get("blake3")
            if name in lost and name not in mended and content_hash(data) == recorded:
                files.write(name, data)
                mended.add(name)
        # The second candidate compares all images, which is slow: only where it is needed.
        if mended == set(lost):
            break
    return sorted(mended)


def _view_candidates(tables: LostTables, view_id: str) -> Iterator[View]:
    """Yield what a view may have been: the table of its blocks, or the user's table."""
    record = read_view_record(tables.files, view_id)
    blocks = [
        StoredBlock(folder=block.folder, store=FeatureStore.block(tables.files.child(block.folder)))
        for block in record.blocks
    ]
    rows: dict[Modality, NDArray[np.int64]] = {
        "image": np.arange(record.block_rows("image")),
        "text": np.arange(record.block_rows("text")),
    }
    # Only a view that takes its blocks in order has a table that follows from them.
    if set(record.in_order) == {"image", "text"}:
        table: PairTable = join_tables([block.table for block in blocks], record.digest)
        yield draft_view(table, rows, [""] * len(table.keys), record)
    if record.table == tables.source.digest:
        matching = Matching(source=tables.source, blocks=blocks, newest=None, retry=False)
        content_rows = matching.rows(tables.contents)
        source = with_columns_of(tables.source, names=record.columns, known={})
        yield table_view(source, blocks, content_rows, record)


def _mend_stamps(tables: LostTables) -> None:
    """Record again what image files look like; without features of images the record is removed."""
    files = tables.files
    files.remove(STAMPS)
    opened = FeatureStore.at(files)
    arrays = [array for array in opened.arrays("image") if array.complete]
    if not arrays:
        return
    hash_of_key = dict(zip(map(str, opened.pairs.keys), arrays[0].content(), strict=True))
    contents = [hash_of_key.get(key) for key in tables.source.keys]
    write_stamps(files, stamp_table(tables.source.keys, tables.contents.stamps, contents))
