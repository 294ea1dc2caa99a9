"""Reading a store: what is in it, also what was appended."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from apecache.arguments import AnyPath, as_place
from apecache.errors import DamagedError, StoreError, nearest
from apecache.fingerprint import Modality, digest_strings
from apecache.storage.files import Files
from apecache.storage.open import open_files
from apecache.store.array import FeatureArray
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
from apecache.store.table import PairTable, read_table


@dataclass(frozen=True)
class FeatureStore:
    """A store that exists. `open` reads only records; features are read by `FeatureArray.load`.

    Rows that were appended lie in segments, each a store of its own in `segments/0001`, …; here
    they follow the rows of the first, in pairs and arrays alike.
    """

    files: Files
    segments: tuple["FeatureStore", ...] = ()

    @staticmethod
    def open(path: AnyPath) -> "FeatureStore":
        """A store in a folder, or on object storage (`s3://BUCKET/…`, `gs://BUCKET/…`,
        `az://CONTAINER/…`).

        Raises:
            StoreError: there is no store at `path`, or one that was not finished being made.
        """
        return FeatureStore.at(open_files(as_place(path, "path")))

    @staticmethod
    def at(files: Files) -> "FeatureStore":
        """Raises as `open` does."""
        if not files.exists(PAIRS):
            if has_arrays(files):
                raise DamagedError(
                    f"{files.where(PAIRS)} is missing; write it again with: apecache repair"
                )
            begun = files.exists(SOURCE)
            what = "was not finished being made; run the same apecache extract again"
            what = what if begun else f"is no store{files.hint()} (make one with: apecache extract)"
            raise StoreError(f"{files.place} {what}")
        read_record(files, PAIRS)
        return FeatureStore(
            files,
            tuple(_open_segment(files, name) for name in segment_names(files)),
        )

    @property
    def path(self) -> str | Path:
        """Where the store is: a folder or a URL."""
        return self.files.place

    @cached_property
    def source(self) -> dict[str, Any]:
        """digest, n_images, n_texts, origin and root of the table that the first segment was made
        from."""
        return read_record(self.files, SOURCE)

    @cached_property
    def digest(self) -> str:
        """Identity of the whole pair table."""
        digests = [self.source["digest"], *(segment.digest for segment in self.segments)]
        return str(digests[0]) if len(digests) == 1 else digest_strings(digests)

    @cached_property
    def pairs(self) -> PairTable:
        """The whole pair table. Raises DamagedError if an object of it is not what was written."""
        tables = [read_table(self.files), *(segment.pairs for segment in self.segments)]
        if len(tables) == 1:
            return tables[0]
        names = ("keys", "splits", "labels", "captions", "languages")
        keys, splits, labels, captions, languages = (
            np.concatenate([getattr(t, n) for t in tables]) for n in names
        )
        starts = accumulate((len(table.keys) for table in tables[:-1]), initial=0)
        image_rows = np.concatenate(
            [t.image_rows + first for t, first in zip(tables, starts, strict=True)]
        )
        return PairTable(
            keys=keys,
            splits=splits,
            labels=labels,
            captions=captions,
            languages=languages,
            image_rows=image_rows,
            digest=self.digest,
        )

    def arrays(self, modality: Modality | None = None) -> list[FeatureArray]:
        """Every array, images first, by name."""
        modalities: Sequence[Modality] = (modality,) if modality else ("image", "text")
        return [self._open_array(kind, name) for kind in modalities for name in self._names(kind)]

    def array(self, modality: Modality, name: str | None = None) -> FeatureArray:
        """One array; without a name the only one of its modality.

        Raises:
            StoreError: there is none, none of that name, or several to choose from.
        """
        names = self._names(modality)
        if name is None and len(names) == 1:
            return self._open_array(modality, names[0])
        if name is not None and name in names:
            return self._open_array(modality, name)
        found = ", ".join(names) or "none"
        wanted = (
            f"no {modality} features {name!r}"
            if name
            else f"{len(names)} arrays of {modality} features"
        )
        if name:
            hint = nearest(name, names)
        elif names:
            hint = f"; choose one with --{modality}-features"
        else:
            hint = ""
        raise StoreError(f"{self.path} has {wanted}; found: {found}{hint}")

    def _open_array(self, modality: Modality, name: str) -> FeatureArray:
        value = read_record(self.files, f"{records_folder(modality, name)}/fingerprint.json")
        record = ArrayRecord.from_json(modality, name, value)
        if record.table != self.source["digest"]:
            raise DamagedError(
                f"{modality}/{name} is of another table than {self.path}; apecache remove "
                f"{self.path} {modality}/{name}"
            )
        there = [segment for segment in self.segments if name in segment._names(modality)]
        count = "n_images" if modality == "image" else "n_texts"
        to_come = sum(segment.source[count] for segment in self.segments if segment not in there)
        appended = tuple(segment._open_array(modality, name) for segment in there)
        return FeatureArray(
            files=self.files,
            record=record,
            appended=appended,
            rows_to_come=to_come,
        )

    def _names(self, modality: Modality) -> list[str]:
        """Arrays that are there. An empty folder is one that a killed writer has just begun."""
        return [
            name
            for name in self.files.list(f"records/{modality}")
            if self.files.list(records_folder(modality, name))
        ]


def segment_names(files: Files) -> list[str]:
    """Names of the appended segments, in order; one that was only just begun is none yet.

    Raises:
        DamagedError: a segment without its record in the store, or the other way round.
    """
    # Arrays first: what has some by now was recorded before it had them.
    begun = {name for name in files.list(SEGMENTS) if has_arrays(files.child(f"{SEGMENTS}/{name}"))}
    recorded = {name.removesuffix(".json") for name in files.list(SEGMENT_RECORDS)}
    for name in sorted(begun - recorded):
        raise DamagedError(
            f"{files.where(segment_record_name(name))} is missing; write it again with: "
            "apecache repair"
        )
    return sorted(recorded)


def _open_segment(files: Files, name: str) -> FeatureStore:
    own = files.child(f"{SEGMENTS}/{name}")
    record = read_record(files, segment_record_name(name))
    if not own.list(""):
        raise DamagedError(
            f"{own.place} is missing ({record['n_images']} images); restore it, or: apecache repair"
        )
    segment = FeatureStore.at(own)
    if segment.source["digest"] != record["digest"]:
        raise DamagedError(
            f"{own.place} is not the segment that was appended in its place; restore it"
        )
    return segment


def has_arrays(files: Files) -> bool:
    """Arrays are begun after the pair table is written, so where there is one, the table was
    there."""
    return any(
        files.exists(f"{records_folder(kind, name)}/fingerprint.json")
        for kind in ("image", "text")
        for name in files.list(f"records/{kind}")
    )
