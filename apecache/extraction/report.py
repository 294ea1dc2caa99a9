"""What an extraction did, and whether the store may stay as it is."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apecache.errors import BadRowsError, DataError
from apecache.extraction.arrays import ExtractSpec
from apecache.extraction.encode import EncodedShard
from apecache.extraction.shard_range import WHOLE, Part
from apecache.fingerprint import Modality
from apecache.storage.files import Files
from apecache.store.layout import ArrayLayout
from apecache.store.reader import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Standing:
    """How far a run is with one modality: `done` of the `rows` of its part. `n_bad` of them could
    not be encoded and `n_bytes` of features were committed, both by this run and in the shards that
    it has finished."""

    modality: Modality
    done: int
    rows: int
    n_bad: int = 0
    n_bytes: int = 0


Progress = Callable[[Standing], None]
"""Called after every batch and every commit."""


@dataclass(frozen=True, kw_only=True)
class ArrayReport:
    """One array after the run. `n_encoded` rows, `n_bytes` of features, were encoded by this run,
    in `seconds`; `n_truncated` captions were cut."""

    modality: Modality
    name: str
    rows: int
    dim: int
    n_encoded: int
    n_quarantined: int
    n_truncated: int
    reasons: dict[str, int]
    examples: tuple[str, ...]
    seconds: float
    n_bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """`duplicates`: images whose files have the same bytes as an earlier one's (each is encoded all
    the same). `seconds`: of the whole run, without loading the encoders. `complete`: nothing is
    left for other parts; else `share_done` says how much of the store's rows is there."""

    store: str | Path
    arrays: tuple[ArrayReport, ...]
    duplicates: int = 0
    seconds: float = 0.0
    part: Part = WHOLE
    share_done: float = 1.0
    complete: bool = True

    @property
    def nothing_to_do(self) -> bool:
        return not any(array.n_encoded for array in self.arrays)


@dataclass(kw_only=True)
class Tally:
    """What a run did for one array, over all segments. `layout` is that of the first."""

    layout: ArrayLayout
    n_encoded: int = 0
    n_truncated: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class Total:
    """What a run did with one modality: rows of all of its passes, those `elsewhere` that are other
    parts', and a tally for each array by name."""

    modality: Modality
    rows: int
    passes: int = 1
    elsewhere: int = 0
    done: int = 0
    n_bad: int = 0
    tallies: dict[str, Tally] = field(default_factory=dict)

    @property
    def standing(self) -> Standing:
        n_bytes = sum(tally.n_bytes for tally in self.tallies.values())
        return Standing(
            modality=self.modality,
            done=self.done,
            rows=self.rows * self.passes - self.elsewhere,
            n_bad=self.n_bad,
            n_bytes=n_bytes,
        )


def count_shard(tally: Tally, encoded: EncodedShard) -> None:
    tally.n_encoded += len(encoded.content)
    tally.n_truncated += encoded.n_truncated
    tally.n_bytes += len(encoded.content) * tally.layout.row_bytes


def judge(
    files: Files,
    totals: Mapping[Modality, Total],
    spec: ExtractSpec,
    begin: float,
) -> ExtractReport:
    """What the run did; where the store is complete, whether it may stay as it is. Raises as
    `extract` does."""
    opened = FeatureStore.at(files)
    reports = tuple(
        _report(opened, total, name) for total in totals.values() for name in total.tallies
    )
    arrays = [opened.array(report.modality, report.name) for report in reports]
    complete = all(array.complete for array in arrays)
    share_done = sum(array.share_done * array.rows for array in arrays) / sum(
        array.rows for array in arrays
    )
    duplicates = _duplicates(opened, reports) if complete else 0
    if complete:
        _require_few_bad(reports, spec.max_bad)
    return ExtractReport(
        store=files.place,
        arrays=reports,
        duplicates=duplicates,
        seconds=time.perf_counter() - begin,
        part=spec.part,
        share_done=share_done,
        complete=complete,
    )


def _report(store: FeatureStore, total: Total, name: str) -> ArrayReport:
    array = store.array(total.modality, name)
    tally = total.tallies[name]
    bad = array.quarantined() if array.n_quarantined else []
    reasons = dict(Counter(row["reason"] for row in bad))
    examples = tuple(f"row {row['row']}: {row['reason']}: {row['detail']}" for row in bad[:5])
    counts = (tally.n_encoded, len(bad), tally.n_truncated)
    about = (total.modality, array.name, array.rows, array.dim)
    modality, name_value, rows, dim = about
    n_encoded, n_quarantined, n_truncated = counts
    return ArrayReport(
        modality=modality,
        name=name_value,
        rows=rows,
        dim=dim,
        n_encoded=n_encoded,
        n_quarantined=n_quarantined,
        n_truncated=n_truncated,
        reasons=reasons,
        examples=examples,
        seconds=tally.seconds,
        n_bytes=tally.n_bytes,
    )


def _require_few_bad(reports: Iterable[ArrayReport], max_bad: float) -> None:
    for report in reports:
        if report.n_quarantined > max_bad * report.rows:
            reasons = ", ".join(
                f"{count} {reason}" for reason, count in sorted(report.reasons.items())
            )
            raise BadRowsError(
                f"{report.n_quarantined} of {report.rows} {report.modality} rows could not be "
                f"encoded ({reasons}; the "
                f"first: {report.examples[0]}); all others are in the store: mend the inputs, or "
                "accept with --max-bad"
            )


def _duplicates(store: FeatureStore, reports: Iterable[ArrayReport]) -> int:
    """Images whose file has the bytes of an earlier one's.

    Raises:
        DataError: two of them stand in different splits, so that what is reported would have been
            trained on.
    """
    name = next((report.name for report in reports if report.modality == "image"), None)
    if name is None:
        return 0
    pairs = store.pairs
    first = dict[str, int]()
    count = 0
    for row, digest in enumerate(store.array("image", name).content()):
        other = first.setdefault(digest, row) if digest else row
        count += other != row
        if pairs.splits[other] != pairs.splits[row]:
            raise DataError(
                f"{pairs.keys[other]} ({pairs.splits[other]}) and {pairs.keys[row]} "
                f"({pairs.splits[row]}) are the same "
                "file in two splits; all features are in the store: take one of them out of the "
                "table"
            )
    return count
