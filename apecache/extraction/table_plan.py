"""Plan the extraction of a table: which blocks it needs, and which view of them it is.

What the store lacks becomes a new block of rows. A view then says which rows of the blocks are
those of the table.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from apecache.data.media import NoMedia
from apecache.data.pairs import PairSource
from apecache.data.recorded import options_to_record
from apecache.data.spec import spec_of_options
from apecache.errors import MismatchError, StoreError
from apecache.extraction.contents import (
    SEEN,
    StoredBlock,
    TableContents,
    equal_contents,
    stored_blocks,
    table_contents,
)
from apecache.extraction.kept_columns import has_columns, keep_columns, source_columns
from apecache.extraction.kept_splits import keep_splits
from apecache.extraction.matching import NEW, Matching, Rows
from apecache.extraction.segments import BlockInputs, Segment, make_segment, pair_columns
from apecache.extraction.spec import ExtractSpec
from apecache.extraction.stamps import stamp_table, write_stamps
from apecache.fingerprint import Modality, content_hash, digest_strings
from apecache.storage.files import Files
from apecache.store.layout import PAIRS, SEGMENTS, SOURCE
from apecache.store.reader import FeatureStore, is_free, segment_names
from apecache.store.records import read_record
from apecache.store.table import PairTable, string_column
from apecache.store.view_edits import column_digests, first_view
from apecache.store.views import (
    BlockReference,
    View,
    ViewRecord,
    commit_view,
    draft_view,
    open_view,
    read_view_record,
    settle_view,
    view_ids,
)
from apecache.store.writer import PairColumns


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Say what an extraction of a table is to do."""

    files: Files
    source: PairSource
    segments: tuple[Segment, ...]
    """Blocks that the table needs, a new one last."""
    view: View | None
    """The view to commit; None where the newest one is that of the table."""
    contents: TableContents
    is_first: bool = False
    """Whether the view is the first of a new store, which is committed before it is complete."""

    def begin(self) -> None:
        """Make the blocks that do not exist, and finish those that a killed run began.

        Raises as `make_segment` does.
        """
        for segment in self.segments:
            make_segment(segment)
        self._remember(self.contents.contents)
        if self.view is not None and self.is_first:
            commit_view(self.files, self.view)

    def finish(self) -> None:
        """Commit the view, once all features are in the store. Raises as `commit_view` does."""
        ids = view_ids(self.files)
        if self.view is None or self.is_first:
            for view_id in ids[-1:]:
                settle_view(self.files, view_id)
        else:
            parent = ids[-1] if ids else commit_view(self.files, first_view(self.files), 0).view
            record = replace(self.view.record, parent=parent)
            commit_view(self.files, replace(self.view, record=record))
        self._remember(self._encoded_contents())

    def store(self) -> FeatureStore:
        """Open the store as the view of the table, committed or not."""
        if self.view is not None:
            return FeatureStore.seen(self.files, self.view)
        return FeatureStore.at(self.files)

    def _encoded_contents(self) -> Sequence[str | None]:
        """Return what is known of each image after encoding."""
        contents = self.contents.contents
        if all(content not in (None, SEEN) for content in contents):
            return contents
        arrays = [array for array in self.store().arrays("image") if array.complete]
        if not arrays:
            return contents
        encoded = arrays[0].content()
        return [
            digest if content in (None, SEEN) else content
            for content, digest in zip(contents, encoded, strict=True)
        ]

    def _remember(self, contents: Sequence[str | None]) -> None:
        """Record size, time and hash of the files, which spares reading them the next time."""
        if isinstance(self.source.media, NoMedia):
            return
        table = stamp_table(self.source.keys, self.contents.stamps, contents)
        # A finished store may lie on a read-only file system, and this is only a cache.
        with contextlib.suppress(StoreError):
            write_stamps(self.files, table)


def plan_table(source: PairSource, files: Files, spec: ExtractSpec) -> TablePlan:
    """Compare a table with a store. Nothing is written.

    Raises:
        DamagedError: The store is damaged.
        MismatchError: The pixels of the store's images were scaled otherwise.
    """
    blocks = stored_blocks(files)
    if not blocks:
        return new_store_plan(source, files, spec)
    require_same_scale(source, files)
    newest = _newest(files)
    source = keep_columns(source, newest)
    matching = Matching(source=source, blocks=blocks, newest=newest, retry=spec.retry)
    contents = table_contents(
        source,
        files=files,
        hashed=bool(spec.images) or matching.has_contents,
        recheck=spec.recheck,
        again=matching.failed_rows if spec.retry else (),
    )
    rows = matching.rows(contents)
    source, splits = keep_splits(source, newest, rows, contents)
    matching = replace(matching, source=source)
    new_block = _new_block(source, files, rows, contents)
    if newest is not None and new_block is None and matching.is_unchanged(rows):
        used = _used_blocks(blocks, matching.newest_folders)
        view = None
    else:
        used = _used_blocks(blocks, _used_folders(blocks, rows))
        view = _view(
            source,
            files=files,
            used=used,
            rows=rows,
            new_block=new_block,
            splits=splits,
        )
    segments: list[Segment] = []
    for block in used:
        block_inputs = stored_inputs(source, block, rows)
        segments.append(Segment(store=files, folder=block.folder, part=block_inputs))
    if new_block is not None:
        segments.append(new_block)
    return TablePlan(
        files=files,
        source=source,
        segments=tuple(segments),
        view=view,
        contents=contents,
        is_first=newest is None,
    )


def require_same_scale(source: PairSource, files: Files) -> None:
    """Refuse another `--scale` than the store's: equal files would have other features."""
    options = read_record(files, SOURCE).get("options", {})
    recorded = spec_of_options(options).pixels.scale
    if recorded != source.pixels.scale:
        source_scale = _scale_text(source.pixels.scale)
        raise MismatchError(
            f"{files.place} was made with --scale {_scale_text(recorded)}, not {source_scale}; "
            "give the same --scale, or choose another --store",
            [("scale", source.pixels.scale, recorded)],
        )


def _scale_text(scale: Sequence[float] | None) -> str:
    return "auto" if scale is None else ",".join(f"{limit:g}" for limit in scale)


def _newest(files: Files) -> FeatureStore | None:
    """Open the newest view; None where a killed run made the blocks, but no view."""
    if not view_ids(files) and read_record(files, SOURCE).get("view_only") is True:
        return None
    return FeatureStore.at(files)


def new_store_plan(source: PairSource, files: Files, spec: ExtractSpec) -> TablePlan:
    """Plan a new store. Equal captions, and images of equal bytes, are encoded once."""
    if spec.images:
        contents = equal_contents(source)
    else:
        contents = table_contents(source, files=files, hashed=False)
    first_rows: dict[str, int] = {}
    images = [NEW] * len(source)
    for row, content in enumerate(contents.contents):
        images[row] = NEW - first_rows.setdefault(content or f"row {row}", len(first_rows))
    captions: dict[str, int] = {}
    texts = [NEW - captions.setdefault(text, len(captions)) for text in source.captions]
    rows = Rows(images=np.array(images, np.int64), texts=np.array(texts, np.int64), problems={})
    all_differ = len(first_rows) == len(source) and len(captions) == len(texts)
    block = Segment(store=files, folder="", part=source)
    if not all_differ:
        new_block = _new_block(source, files, rows, contents)
        assert new_block is not None
        block = new_block
    view: View | None = None
    # A block of the whole table needs no view, but has no further columns.
    if source.columns or not all_differ:
        view = _view(source, files=files, used=(), rows=rows, new_block=block)
    return TablePlan(
        files=files,
        source=source,
        segments=(block,),
        view=view,
        contents=contents,
        is_first=True,
    )


def _used_folders(blocks: Sequence[StoredBlock], rows: Rows) -> list[str]:
    """Return the folders of the blocks that rows lie in; the first block if there are none."""
    used: list[str] = []
    n_images = 0
    n_texts = 0
    for block in blocks:
        reference = block.reference
        has_images = _any_between(rows.images, n_images, n_images + reference.n_images)
        has_texts = _any_between(rows.texts, n_texts, n_texts + reference.n_texts)
        if has_images or has_texts:
            used.append(block.folder)
        n_images += reference.n_images
        n_texts += reference.n_texts
    return used or [blocks[0].folder]


def _any_between(rows: NDArray[np.int64], begin: int, end: int) -> bool:
    return bool(((rows >= begin) & (rows < end)).any())


def _used_blocks(blocks: Sequence[StoredBlock], folders: Sequence[str]) -> list[StoredBlock]:
    return [block for block in blocks if block.folder in folders]


# --- blocks ---------------------------------------------------------------------------------------


def stored_inputs(source: PairSource, block: StoredBlock, rows: Rows) -> BlockInputs:
    """Give the inputs of a block that exists: each image where the table has it now."""
    columns = block_columns(block)
    keys = list(columns.keys)
    first = rows.first_image[block.folder]
    # Of several keys the block's own comes first, so that a resume reads the same file.
    settled: set[int] = set()
    for row, content_row in enumerate(rows.images.tolist()):
        block_row = content_row - first
        if 0 <= block_row < len(keys) and block_row not in settled:
            is_own = source.keys[row] == columns.keys[block_row]
            if is_own or keys[block_row] == columns.keys[block_row]:
                keys[block_row] = source.keys[row]
            if is_own:
                settled.add(block_row)
    return BlockInputs(
        columns=columns,
        keys=keys,
        contents=[content or "" for content in block.contents],
        media=source.media,
        pixels=source.pixels,
    )


def block_columns(block: StoredBlock) -> PairColumns:
    """Return the table of a block as it is stored.

    Raises:
        DamagedError: An object of the table is not what was written.
    """
    table = block.table
    recorded = block.store.block_source
    return PairColumns(
        keys=table.keys.tolist(),
        splits=table.splits.tolist(),
        labels=table.labels.tolist(),
        captions=table.captions.tolist(),
        languages=table.languages.tolist(),
        image_rows=table.image_rows.tolist(),
        digest=recorded["digest"],
        origin=recorded["origin"],
        contents=block.declared if recorded.get("view_only") is True else None,
    )


def block_table(
    keys: list[str],
    contents: list[str],
    captions: list[str],
    languages: list[str],
    image_rows: list[int],
    origin: str,
) -> PairColumns:
    """Return the table of a block that only views refer to."""
    return PairColumns(
        keys=keys,
        splits=[""] * len(keys),
        labels=[""] * len(keys),
        captions=captions,
        languages=languages,
        image_rows=image_rows,
        digest=digest_strings(["block", *keys, *contents, *captions, *languages]),
        origin=origin,
        contents=contents,
    )


def _new_block(
    source: PairSource,
    files: Files,
    rows: Rows,
    contents: TableContents,
) -> Segment | None:
    """Return the block of what the store lacks; None where it lacks nothing."""
    # NEW and below: row 0, 1, … of the new block.
    new_images, first_images = np.unique(NEW - rows.images, return_index=True)
    new_texts, first_texts = np.unique(NEW - rows.texts, return_index=True)
    first_images = first_images[new_images >= 0]
    first_texts = first_texts[new_texts >= 0]
    if not len(first_images) and not len(first_texts):
        return None
    keys = [source.keys[row] for row in first_images.tolist()]
    hashes = [contents.contents[row] or "" for row in first_images.tolist()]
    declared = ["" if digest == SEEN else digest for digest in hashes]
    captions = [source.captions[row] for row in first_texts.tolist()]
    languages = [source.languages[row] for row in first_texts.tolist()]
    image_rows: list[int] = []
    for row in first_texts.tolist():
        image_row = NEW - int(rows.images[source.image_rows[row]])
        image_rows.append(max(-1, image_row))
    columns = block_table(
        keys=keys,
        contents=declared,
        captions=captions,
        languages=languages,
        image_rows=image_rows,
        origin=source.origin,
    )
    block_inputs = BlockInputs(
        columns=columns,
        keys=keys,
        contents=declared,
        media=source.media,
        pixels=source.pixels,
    )
    return Segment(store=files, folder=new_folder(files, columns.digest), part=block_inputs)


def new_folder(files: Files, digest: str) -> str:
    """Return the folder of a new block, which a killed run may have begun already."""
    if not files.exists(SOURCE) or read_record(files, SOURCE)["digest"] == digest:
        return ""
    number = 1 + max(map(int, segment_names(files)), default=0)
    while True:
        folder = f"{SEGMENTS}/{number:04d}"
        is_begun = files.exists(f"{folder}/{SOURCE}")
        # A block that was begun for another table, and not made, stays as it is.
        if is_begun and read_record(files.child(folder), SOURCE)["digest"] == digest:
            return folder
        if not is_begun and is_free(files, folder):
            return folder
        number += 1


# --- the view -------------------------------------------------------------------------------------


def _view(
    source: PairSource,
    files: Files,
    used: Sequence[StoredBlock],
    rows: Rows,
    new_block: Segment | None,
    splits: str = "",
) -> View:
    """Return the view of the table, to be committed."""
    references = [block.reference for block in used]
    if new_block is not None:
        columns = pair_columns(new_block.part)
        references.append(
            BlockReference(
                folder=new_block.folder,
                digest=columns.digest,
                n_images=len(columns.keys),
                n_texts=len(columns.captions),
            )
        )
    record = ViewRecord(
        view="",
        name="",
        parent="",
        digest="",
        table=source.digest,
        n_images=len(source),
        n_texts=len(source.captions),
        origin=source.origin,
        root=source.media.place,
        options=options_to_record(source),
        blocks=tuple(references),
        splits=splits,
        objects={},
    )
    view = table_view(source, used, rows, record)
    return replace(view, record=replace(view.record, digest=_view_digest(files, view)))


def table_view(
    source: PairSource,
    used: Sequence[StoredBlock],
    rows: Rows,
    record: ViewRecord,
) -> View:
    """Return a table as a view of some blocks.

    Args:
        source: The table.
        used: Blocks of the view that exist.
        rows: Rows of the table in all blocks of the store.
        record: Record of the view.
    """
    content_rows: dict[Modality, NDArray[np.int64]] = {
        "image": _within(rows.images, "image", used, rows.first_image),
        "text": _within(rows.texts, "text", used, rows.first_text),
    }
    problems = [rows.problems.get(row, "") for row in range(len(source))]
    table = source_table(source, record.digest)
    return draft_view(table, content_rows, problems, record)


def _within(
    rows: NDArray[np.int64],
    modality: Modality,
    used: Sequence[StoredBlock],
    first_rows: Mapping[str, int],
) -> NDArray[np.int64]:
    """Count rows through the used blocks only, and the new block behind them."""
    result = np.full(len(rows), -1, np.int64)
    first = 0
    for block in used:
        stored_first = first_rows[block.folder]
        n_rows = block.reference.rows(modality)
        inside = (rows >= stored_first) & (rows < stored_first + n_rows)
        result[inside] = rows[inside] - stored_first + first
        first += n_rows
    is_new = rows <= NEW
    result[is_new] = NEW - rows[is_new] + first
    return result


def _view_digest(files: Files, view: View) -> str:
    """Return the identity of a view; that of an earlier one which says the same."""
    modalities: tuple[Modality, ...] = ("image", "text")
    ids = view_ids(files)
    for view_id in reversed(ids):
        record = read_view_record(files, view_id)
        if record.table != view.record.table or record.blocks != view.record.blocks:
            continue
        earlier = open_view(files, view_id)
        same_rows = all(
            np.array_equal(earlier.content_rows(modality), view.content_rows(modality))
            for modality in modalities
        )
        if same_rows and has_columns(earlier.table, view.table.columns):
            return record.digest
    blocks = view.record.blocks
    # The first view of a new store, where the table alone says all.
    is_new = not files.exists(PAIRS) or read_record(files, SOURCE).get("view_only") is True
    further = column_digests(view.table.columns)
    if not ids and len(blocks) == 1 and is_new and not further:
        return view.record.table
    row_hashes = [content_hash(view.content_rows(name).tobytes()) for name in modalities]
    digests = [block.digest for block in blocks]
    return digest_strings([view.record.table, *digests, *row_hashes, *further])


def source_table(source: PairSource, digest: str) -> PairTable:
    """Return the columns of a source as a view has them."""
    return PairTable(
        keys=string_column(source.keys),
        splits=string_column([pair.split for pair in source]),
        labels=string_column([pair.label for pair in source]),
        captions=string_column(source.captions),
        languages=string_column(source.languages),
        image_rows=np.array(source.image_rows, np.int64),
        digest=digest,
        columns=source_columns(source),
    )
