"""Open a store and read what is in it, with its appended segments."""

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
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.array import FeatureArray
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

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource


@dataclass(frozen=True)
class FeatureStore:
    """Read an existing store. `open` reads only records; `FeatureArray.load` reads features.

    Appended rows are in segments, each a store of its own in `segments/0001`, … In pairs and in
    arrays they follow the rows of the store itself, the first segment.
    """

    files: Files
    segments: tuple["FeatureStore", ...] = ()

    @staticmethod
    def open(path: AnyPath) -> "FeatureStore":
        """Open a store.

        Args:
            path: A folder, or a URL of object storage (`s3://BUCKET/…`, `gs://BUCKET/…`,
                `az://CONTAINER/…`).

        Raises:
            StoreError: There is not a store at `path`, or it was not finished being made.
        """
        return FeatureStore.at(open_files(as_place(path, "path")))

    @staticmethod
    def at(files: Files) -> "FeatureStore":
        """Open a store at files that are opened already; raises as `open` does."""
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
        segments = tuple(_open_segment(files, name) for name in segment_names(files))
        return FeatureStore(files, segments)

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
    def source(self) -> dict[str, Any]:
        """Return digest, n_images, n_texts, origin and root of the first segment's table."""
        return read_record(self.files, SOURCE)

    @property
    def last_source(self) -> dict[str, Any]:
        """Return the record of the last segment's table, which has the rows of all segments."""
        return self.segments[-1].source if self.segments else self.source

    @cached_property
    def digest(self) -> str:
        """Return the identity of the whole pair table."""
        digests = [self.source["digest"], *(segment.digest for segment in self.segments)]
        return str(digests[0]) if len(digests) == 1 else digest_strings(digests)

    @cached_property
    def pairs(self) -> PairTable:
        """Return the whole pair table.

        Raises:
            DamagedError: An object of the table is not what was written.
        """
        tables = [read_table(self.files), *(segment.pairs for segment in self.segments)]
        return tables[0] if len(tables) == 1 else join_tables(tables, self.digest)

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
        value = read_record(self.files, f"{records_folder(modality, name)}/fingerprint.json")
        record = ArrayRecord.from_json(modality, name, value)
        # Rows of another table would be given to the wrong images.
        if record.table != self.source["digest"]:
            raise DamagedError(
                f"{modality}/{name} is of another table than {self.path}; apecache remove "
                f"{self.path} {modality}/{name}"
            )
        segments_with_array = [
            segment for segment in self.segments if name in segment._names(modality)
        ]
        count = "n_images" if modality == "image" else "n_texts"
        rows_to_come = 0
        for segment in self.segments:
            if segment not in segments_with_array:
                rows_to_come += segment.source[count]
        appended = tuple(segment._open_array(modality, name) for segment in segments_with_array)
        return FeatureArray(
            files=self.files,
            record=record,
            appended=appended,
            rows_to_come=rows_to_come,
        )

    def _names(self, modality: Modality) -> list[str]:
        """Return the names of the arrays of one modality."""
        names = []
        for name in self.files.list(f"records/{modality}"):
            # An empty folder is an array that a killed writer had only begun.
            if self.files.list(records_folder(modality, name)):
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


def _open_segment(files: Files, name: str) -> FeatureStore:
    """Open an appended segment, and check that it is the one that the store has recorded."""
    segment_files = files.child(f"{SEGMENTS}/{name}")
    record = read_record(files, segment_record_name(name))
    if not segment_files.list(""):
        raise DamagedError(
            f"{segment_files.place} is missing ({counted(record['n_images'], 'image')}); "
            "restore it, or: "
            "apecache repair"
        )
    segment = FeatureStore.at(segment_files)
    if segment.source["digest"] != record["digest"]:
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
