"""Report what an extraction did, and judge whether the store is good enough."""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apecache.errors import BadRowsError, DataError
from apecache.extraction.encode import EncodedShard
from apecache.extraction.shard_range import WHOLE, ShardRange
from apecache.extraction.spec import ExtractSpec, MeasuredPrecision
from apecache.extraction.table_plan import TablePlan
from apecache.fingerprint import Modality
from apecache.store.layout import ArrayLayout
from apecache.store.reader import FeatureStore

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ExtractionState:
    """Say how far a run is with one modality."""

    modality: Modality
    done: int
    """Rows that are encoded, in this run or before."""
    rows: int
    """Rows of the run's part of the store."""
    n_bad: int = 0
    """Rows that this run could not encode, in the shards that it has finished."""
    n_bytes: int = 0
    """Bytes of features that this run has committed."""


ExtractionProgress = Callable[[ExtractionState], None]
"""Called after every batch and every commit."""


@dataclass(frozen=True, kw_only=True)
class ArrayReport:
    """Describe one array after the run."""

    modality: Modality
    name: str
    rows: int
    dim: int
    n_encoded: int
    """Rows that this run encoded."""
    n_quarantined: int
    """Rows of the whole array that could not be encoded."""
    n_truncated: int
    """Captions of this run that were longer than the encoder takes."""
    reasons: dict[str, int]
    """Number of quarantined rows for each reason."""
    examples: tuple[str, ...]
    """The first five quarantined rows."""
    seconds: float
    """Of this run."""
    n_bytes: int = 0
    """Bytes of features of this run."""


@dataclass(frozen=True, kw_only=True)
class ExtractReport:
    """Describe an extraction."""

    store: str | Path
    arrays: tuple[ArrayReport, ...]
    duplicates: int = 0
    """Images whose files have the same bytes as an earlier one's."""
    seconds: float = 0.0
    """Of the whole run, without loading the encoders."""
    part: ShardRange = WHOLE
    share_done: float = 1.0
    """Share of the rows of all arrays that are in the store."""
    complete: bool = True
    """Nothing is left for other parts to encode."""
    measured: tuple[MeasuredPrecision, ...] = ()
    """Errors of the precisions of new arrays."""
    further_columns: tuple[str, ...] = ()
    """Further columns of the table that its view holds, named or kept from the view before."""

    @property
    def nothing_to_do(self) -> bool:
        return not any(array.n_encoded for array in self.arrays)


@dataclass(kw_only=True)
class ArrayCounts:
    """Count what a run did for one array, over all segments."""

    layout: ArrayLayout
    """Of the first segment."""
    n_encoded: int = 0
    n_truncated: int = 0
    n_bytes: int = 0
    seconds: float = 0.0


@dataclass(kw_only=True)
class ModalityCounts:
    """Count what a run did with one modality."""

    modality: Modality
    rows: int
    """Of one pass."""
    passes: int = 1
    """How often the inputs are read: once for each job."""
    elsewhere: int = 0
    """Rows of all passes that belong to other parts."""
    done: int = 0
    n_bad: int = 0
    tallies: dict[str, ArrayCounts] = field(default_factory=dict)
    """By the name of the array."""

    @property
    def standing(self) -> ExtractionState:
        """Return how far the run is."""
        n_bytes = sum(tally.n_bytes for tally in self.tallies.values())
        return ExtractionState(
            modality=self.modality,
            done=self.done,
            rows=self.rows * self.passes - self.elsewhere,
            n_bad=self.n_bad,
            n_bytes=n_bytes,
        )


def count_shard(tally: ArrayCounts, encoded: EncodedShard) -> None:
    """Add a committed shard to the tally of its array."""
    tally.n_encoded += len(encoded.content)
    tally.n_truncated += encoded.n_truncated
    tally.n_bytes += len(encoded.content) * tally.layout.row_bytes


def judge(
    plan: TablePlan,
    totals: Mapping[Modality, ModalityCounts],
    spec: ExtractSpec,
    begin: float,
) -> ExtractReport:
    """Report the run, commit the view of a complete store, and refuse it if it is not good enough.

    Args:
        plan: What the run was to do.
        begin: `time.perf_counter()` at the start of the run.

    Raises:
        BadRowsError, DataError: as `extract` does.
    """
    opened = plan.store()
    reports: list[ArrayReport] = []
    for total in totals.values():
        reports += [_report(opened, total, name) for name in total.tallies]
    arrays = [opened.array(report.modality, report.name) for report in reports]
    complete = all(array.complete for array in arrays)
    n_rows = sum(array.rows for array in arrays)
    share_done = sum(array.share_done * array.rows for array in arrays) / max(1, n_rows)
    if complete:
        plan.finish()
    # The part that ends last judges the whole store; the others know only their own rows.
    duplicates = _duplicates(opened, reports) if complete else 0
    if complete:
        _require_few_bad(reports, spec.max_bad)
    _log_reports(reports, share_done)
    return ExtractReport(
        store=plan.files.place,
        arrays=tuple(reports),
        duplicates=duplicates,
        seconds=time.perf_counter() - begin,
        part=spec.part,
        share_done=share_done,
        complete=complete,
        measured=spec.measured,
        further_columns=tuple(plan.source.columns),
    )


def _report(store: FeatureStore, total: ModalityCounts, name: str) -> ArrayReport:
    array = store.array(total.modality, name)
    tally = total.tallies[name]
    # Quarantine files are read only where there is something in them.
    bad_rows = array.quarantined() if array.n_quarantined else []
    reasons = Counter(row["reason"] for row in bad_rows)
    examples = [f"row {row['row']}: {row['reason']}: {row['detail']}" for row in bad_rows[:5]]
    return ArrayReport(
        modality=total.modality,
        name=array.name,
        rows=array.rows,
        dim=array.dim,
        n_encoded=tally.n_encoded,
        n_quarantined=len(bad_rows),
        n_truncated=tally.n_truncated,
        reasons=dict(reasons),
        examples=tuple(examples),
        seconds=tally.seconds,
        n_bytes=tally.n_bytes,
    )


def _log_reports(reports: Iterable[ArrayReport], share_done: float) -> None:
    """Log what this run encoded, and a warning for each array with unreadable rows."""
    for report in reports:
        array_name = f"{report.modality} features {report.name}"
        logger.info(
            "%s: %d rows encoded in %.1f s; the store has %.0f %% of all rows",
            array_name,
            report.n_encoded,
            report.seconds,
            100 * share_done,
        )
        if report.n_quarantined:
            logger.warning(
                "%s: %d of %d rows could not be encoded; the first: %s",
                array_name,
                report.n_quarantined,
                report.rows,
                report.examples[0],
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
                f"accept this share with {accepting(report.n_quarantined, report.rows)}"
            )


def accepting(n_bad: int, n_rows: int) -> str:
    """Return the option that accepts a number of unreadable rows: a share, rounded up."""
    return f"--max-bad {math.ceil(100 * n_bad / n_rows) / 100:g}"


def _duplicates(store: FeatureStore, reports: Iterable[ArrayReport]) -> int:
    """Count the images whose file has the bytes of an earlier one's.

    Raises:
        DataError: two of them are in different splits, so that figures would be reported on images
            that were trained on.
    """
    # All image arrays have the same inputs, so the first one will do.
    name = next((report.name for report in reports if report.modality == "image"), None)
    if name is None:
        return 0
    pairs = store.pairs
    first_rows = dict[str, int]()
    n_duplicates = 0
    for row, digest in enumerate(store.array("image", name).content()):
        # Unreadable images have no digest, and are nobody's duplicates.
        first_row = first_rows.setdefault(digest, row) if digest else row
        n_duplicates += first_row != row
        if pairs.splits[first_row] != pairs.splits[row]:
            raise DataError(
                f"{pairs.keys[first_row]} ({pairs.splits[first_row]}) and {pairs.keys[row]} "
                f"({pairs.splits[row]}) are the same "
                "file in two splits; all features are in the store: take one of them out of the "
                "table"
            )
    return n_duplicates
