"""Open a store and read what is in it, as one of its views."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_place
from apecache.errors import DamagedError, StoreError, counted, nearest
from apecache.fingerprint import Modality, digest_strings
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.open import open_files
from apecache.store.array import FeatureArray
from apecache.store.gather import OrderedViewArray, ViewArray
from apecache.store.joined import BETWEEN_NAMES, join_arrays
from apecache.store.layout import (
    PAIRS,
    SEGMENT_RECORDS,
    SEGMENTS,
    SOURCE,
    ArrayRecord,
    records_folder,
    segment_record_name,
)
from apecache.store.records import read_record
from apecache.store.table import PairTable, join_tables, read_table
from apecache.store.views import View, find_view, open_view, read_view_record, view_ids

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource


@dataclass(frozen=True)
class FeatureStore:
    """Read an existing store. `open` reads only records; `FeatureArray.load` reads features.

    Rows lie in blocks: the store itself, and `segments`, each a store of its own in
    `segments/0001`, … A view says which rows of the blocks are those of its table. A store without
    views is read as the table of its blocks.
    """

    files: Files
    segments: tuple["FeatureStore", ...] = ()
    """The later blocks."""
    view: View | None = None
    first: Files | None = None
    """The first block; None: the store itself."""

    @staticmethod
    def open(path: AnyPath, view: str | None = None) -> "FeatureStore":
        """Open a store.

        Args:
            path: A folder, or a URL of object storage (`s3://BUCKET/…`, `gs://BUCKET/…`,
                `az://CONTAINER/…`).
            view: Id, number or name of a view; None for the newest.

        Raises:
            StoreError: There is not a store at `path`, or it was not finished being made; or it has
                no such view.
        """
        return FeatureStore.at(open_files(as_place(path, "path")), view)

    @staticmethod
    def at(files: Files, view: str | None = None) -> "FeatureStore":
        """Open a store at files that are opened already; raises as `open` does."""
        _require_made(files)
        if view is not None:
            return FeatureStore.seen(files, open_view(files, find_view(files, view)))
        ids = view_ids(files)
        while ids:
            try:
                return FeatureStore.seen(files, open_view(files, ids[-1]))
            except DamagedError:
                # The view may just have been replaced: then there is a newer one.
                found_ids = view_ids(files)
                if found_ids == ids:
                    raise
                ids = found_ids
        if read_record(files, SOURCE).get("view_only") is True:
            raise StoreError(
                f"{files.place} was not finished being made; run the same apecache extract again"
            )
        names = segment_names(files)
        return FeatureStore(
            files,
            tuple(_open_segment(files, name) for name in names if not _is_view_only(files, name)),
        )

    @staticmethod
    def seen(files: Files, view: View) -> "FeatureStore":
        """Open a store as a view, which may not be committed yet; raises as `open` does."""
        _require_made(files)
        # Raises if the record of a block is lost.
        segment_names(files)
        blocks: list[FeatureStore] = []
        for block in view.record.blocks:
            if block.folder:
                blocks.append(_open_segment(files, block.folder.rpartition("/")[2]))
            else:
                blocks.append(FeatureStore(files))
        store = FeatureStore(files, tuple(blocks[1:]), view, first=blocks[0].files)
        for block, opened in zip(view.record.blocks, store.blocks, strict=True):
            if opened.block_source["digest"] != block.digest:
                raise DamagedError(
                    f"{opened.path} is not the block that view {view.record.view} was made of; "
                    "restore it"
                )
        return store

    @staticmethod
    def block(files: Files) -> "FeatureStore":
        """Open one block alone, with its own table; raises as `open` does."""
        _require_made(files)
        return FeatureStore(files)

    @staticmethod
    def physical(files: Files) -> "FeatureStore":
        """Open all blocks of a store with their own tables, whatever its views are."""
        _require_made(files)
        return FeatureStore(
            files,
            tuple(_open_segment(files, name) for name in segment_names(files)),
        )

    @property
    def blocks(self) -> tuple["FeatureStore", ...]:
        """Return the blocks that the rows lie in, each with its own table."""
        return (FeatureStore(self._first), *self.segments)

    @property
    def _first(self) -> Files:
        return self.first or self.files

    @staticmethod
    def from_arrays(
        image: "NDArray[np.floating] | None",
        text: "NDArray[np.floating] | None",
        pairs: "PairSource | NDArray[np.integer] | None" = None,
        path: AnyPath | None = None,
        names: tuple[str, str] = ("image", "text"),
    ) -> "FeatureStore":
        """Make a store of features in memory; a call that was interrupted is resumed.

        Args:
            image: [n_images, …], float16 or float32: rows in the order of the table.
            text: [n_texts, …], as `image`: captions image by image.
            pairs: The table; or the row of each text's image, int [n_texts]; None: row i of the
                images belongs to row i of the texts.
            path: Where the store is made, as for `open`; None: in a temporary folder, which is
                removed when the program ends.
            names: Names of the image and of the text features.

        Raises:
            DataError: The arrays do not fit the table or one another.
            MismatchError: There is a store of another table, or of other features of these names.
        """
        # Only here: reading a store needs none of it.
        from apecache.store.import_memory import store_arrays, temporary_folder

        files = open_files(temporary_folder() if path is None else as_place(path, "path"))
        store_arrays(files, (image, text), pairs=pairs, names=names)
        return FeatureStore.at(files)

    @property
    def path(self) -> str | Path:
        """Return where the store is: a folder or a URL."""
        return self.files.place

    @cached_property
    def block_source(self) -> dict[str, Any]:
        """Return digest, n_images, n_texts, origin and root of the first block's own table."""
        return read_record(self._first, SOURCE)

    @cached_property
    def source(self) -> dict[str, Any]:
        """Return digest, n_images, n_texts, origin and root of the table; or of its first part."""
        if self.view is None:
            return self.block_source
        record = self.view.record
        return {
            "digest": record.digest,
            "n_images": record.n_images,
            "n_texts": record.n_texts,
            "origin": record.origin,
            "root": record.root,
            "options": dict(record.options),
        }

    @property
    def last_source(self) -> dict[str, Any]:
        """Return the record of the table that has all rows: the view's, or the last segment's."""
        if self.view is not None:
            return self.source
        return self.segments[-1].source if self.segments else self.source

    @cached_property
    def digest(self) -> str:
        """Return the identity of the view: of the whole table and of what its rows point to."""
        if self.view is not None:
            return self.view.record.digest
        digests = [self.source["digest"], *(segment.digest for segment in self.segments)]
        return str(digests[0]) if len(digests) == 1 else digest_strings(digests)

    @property
    def older_view(self) -> str | None:
        """Return the id of the view where the store has a newer one; None for the newest."""
        if self.view is None or view_ids(self.files)[-1] == self.view.record.view:
            return None
        return self.view.record.view

    def view_of(self, digest: object) -> str | None:
        """Return the id of the newest view that has a digest, as a run records it; else None."""
        for view_id in reversed(view_ids(self.files)):
            if read_view_record(self.files, view_id).digest == digest:
                return view_id
        return None

    def trained_digest(self, recorded: object) -> str:
        """Return a digest that a run has recorded if any view has it; else that of this view."""
        return str(recorded) if self.view_of(recorded) is not None else self.digest

    def hint(self, digest: object) -> str:
        """Return `; give --view …` if another view has a digest that a run has recorded."""
        view_id = self.view_of(digest)
        return "" if view_id is None else f"; give --view {view_id}"

    @cached_property
    def pairs(self) -> PairTable:
        """Return the whole pair table; a column is read when it is first asked for.

        Reading a column raises DamagedError if an object of it is not what was written.
        """
        if self.view is not None:
            return self.view.table
        tables = [read_table(self._first), *(segment.pairs for segment in self.segments)]
        if len(tables) == 1:
            return tables[0]
        n_images = [block.block_source["n_images"] for block in self.blocks]
        return join_tables(tables, self.digest, n_images)

    def arrays(self, modality: Modality | None = None) -> list[FeatureArray]:
        """Return every array, images first, sorted by name."""
        modalities: Sequence[Modality] = (modality,) if modality else ("image", "text")
        arrays = []
        for array_modality in modalities:
            for name in self._names(array_modality):
                arrays.append(self._open_array(array_modality, name))
        return arrays

    def array(self, modality: Modality, name: str | None = None) -> FeatureArray:
        """Return one array; without a name, the only one of its modality.

        Names with commas between them give one array, whose features stand side by side.

        Raises:
            StoreError: There is no array, none of that name, or several to choose from.
            OptionError: The arrays that are named cannot be joined.
        """
        if name is not None and BETWEEN_NAMES in name:
            singles = [self.array(modality, single) for single in name.split(BETWEEN_NAMES)]
            return join_arrays(singles)
        names = self._names(modality)
        if name is None and len(names) == 1:
            return self._open_array(modality, names[0])
        if name is not None and name in names:
            return self._open_array(modality, name)
        if name:
            problem = f"no {modality} features {name!r}"
            hint = nearest(name, names)
        else:
            problem = f"{len(names)} arrays of {modality} features"
            hint = f"; choose one with --{modality}-features" if names else ""
        available = ", ".join(names) or "none"
        raise StoreError(f"{self.path} has {problem}; found: {available}{hint}")

    def _open_array(self, modality: Modality, name: str) -> FeatureArray:
        value = read_record(self._first, f"{records_folder(modality, name)}/fingerprint.json")
        record = ArrayRecord.from_json(modality, name, value)
        # Rows of another table would be given to the wrong images.
        if record.table != self.block_source["digest"]:
            raise DamagedError(
                f"{modality}/{name} is of another table than {self.path}; apecache remove "
                f"{self.path} {modality}/{name}"
            )
        count = "n_images" if modality == "image" else "n_texts"
        appended: list[FeatureArray] = []
        rows_to_come = 0
        for segment in self.segments:
            # Rows behind a gap count as missing too, since they would lie at wrong places.
            if rows_to_come or name not in segment._names(modality):
                rows_to_come += segment.block_source[count]
            else:
                appended.append(segment._open_array(modality, name))
        array = FeatureArray(
            files=self._first,
            record=record,
            appended=tuple(appended),
            rows_to_come=rows_to_come,
        )
        index = None if self.view is None else self.view.index(modality)
        if self.view is None:
            return array
        if index is None:
            return OrderedViewArray(**vars(array), view=self.view)
        return ViewArray(**vars(array), view=self.view, index=index)

    def _names(self, modality: Modality) -> list[str]:
        """Return the names of the arrays of one modality."""
        names = []
        for name in self._first.list(f"records/{modality}"):
            # An empty folder is an array that a killed writer had only begun.
            if self._first.list(records_folder(modality, name)):
                names.append(name)
        return names


def segment_names(files: Files) -> list[str]:
    """Return the names of the appended segments, in order, without one that was only begun.

    Raises:
        DamagedError: A segment has no record in the store.
    """
    # Arrays are listed before records: a segment that has some by now was recorded before.
    begun_names = {
        name for name in files.list(SEGMENTS) if has_arrays(files.child(f"{SEGMENTS}/{name}"))
    }
    recorded = {name.removesuffix(".json") for name in files.list(SEGMENT_RECORDS)}
    for name in sorted(begun_names - recorded):
        raise DamagedError(
            f"{files.where(segment_record_name(name))} is missing; write it again with: "
            "apecache repair"
        )
    return sorted(recorded)


def is_free(files: Files, folder: str) -> bool:
    """Return whether a new block can be made in a folder.

    After a power cut, a removed block may be there again in part, without its source record.
    """
    names = (name.rpartition("/")[2] for name in files.sizes(folder))
    return all(name.startswith(TEMPORARY) for name in names)


def _is_view_only(files: Files, name: str) -> bool:
    """Return whether a block is part of views only, and not of the table of all blocks."""
    return read_record(files, segment_record_name(name)).get("view_only") is True


def _require_made(files: Files) -> None:
    """Raise StoreError unless there is a store, made completely."""
    if not files.exists(PAIRS):
        if has_arrays(files):
            raise DamagedError(
                f"{files.where(PAIRS)} is missing; write it again with: apecache repair"
            )
        if files.exists(SOURCE):
            problem = "was not finished being made; run the same apecache extract again"
        else:
            problem = f"is not a store{files.hint()} (make one with: apecache extract)"
        raise StoreError(f"{files.place} {problem}")
    read_record(files, PAIRS)


def _open_segment(files: Files, name: str) -> FeatureStore:
    """Open a later block, and check that it is the one that the store has recorded."""
    segment_files = files.child(f"{SEGMENTS}/{name}")
    record = read_record(files, segment_record_name(name))
    if not segment_files.list(""):
        raise DamagedError(
            f"{segment_files.place} is missing ({counted(record['n_images'], 'image')}); "
            "restore it, or: "
            "apecache repair"
        )
    segment = FeatureStore.block(segment_files)
    if segment.block_source["digest"] != record["digest"]:
        raise DamagedError(
            f"{segment_files.place} is not the segment that was appended in its place; restore it"
        )
    return segment


def has_arrays(files: Files) -> bool:
    """Return whether a store has arrays, which are begun only after the pair table is written."""
    for modality in ("image", "text"):
        for name in files.list(f"records/{modality}"):
            if files.exists(f"{records_folder(modality, name)}/fingerprint.json"):
                return True
    return False
