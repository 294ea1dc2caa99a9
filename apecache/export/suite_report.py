"""What a suite of another program gives: figures per data set, and what could not be measured."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apecache.metrics.statistics import accuracy_interval

LEADING = ("acc1", "mean_recall@1", "acc", "mean_average_precision")
"""Figures that stand for a data set without a main metric, the first that it has."""
NO_SHARE = ("mean_average_precision", "ap", "ap_weighted", "map", "mrr", "ndcg")
"""Beginnings of the names of figures that are no shares of images: they have no interval here."""
SOURCE = "source.txt"
"""In the folder of a data set: where its images are from, if they are not the published ones."""


@dataclass(frozen=True, kw_only=True)
class SuiteRow:
    """Hold the figures of one data set."""

    data_set: str
    title: str
    metrics: Mapping[str, float]
    """As the other program names them, 0 to 1."""
    intervals: Mapping[str, tuple[float, float]]
    """95 % intervals of shares of images, 0 to 1; figures that are no shares have none."""
    n_images: int
    main_metric: str | None
    """Of DataComp or mteb; None elsewhere."""
    source: str = ""
    """First line of `source.txt`; empty: the published data set, as far as is known."""
    stamp: str = ""
    """Of the names, sizes and times of the files: a result of other files is measured again."""

    @property
    def shown(self) -> str:
        """The figure that stands for the data set."""
        if self.main_metric in self.metrics:
            return str(self.main_metric)
        return next((name for name in LEADING if name in self.metrics), next(iter(self.metrics)))


@dataclass(frozen=True, kw_only=True)
class SuiteReport:
    """Hold the figures of all data sets, and what is missing."""

    suite: str
    rows: tuple[SuiteRow, ...]
    missing: tuple[str, ...] = ()
    """Tasks of DataComp without data, or whose main metric is not computed here."""
    main_score: float | None = None
    """Mean of the main metrics of the tasks that were measured; None outside of DataComp."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """Data sets that could not be measured, with the reason."""


def share_intervals(shares: Mapping[str, float], n_images: int) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of shares of images; none for figures that are no shares."""
    intervals = {}
    for name, share in shares.items():
        if n_images and not name.startswith(NO_SHARE):
            low, high = accuracy_interval(100 * share, n_images)
            intervals[name] = (low / 100, high / 100)
    return intervals


def data_source(folder: Path) -> str:
    """Return the first line of the note on where the data are from; empty without it."""
    path = folder / SOURCE
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return lines[0].strip() if lines else ""


def folder_stamp(folder: Path) -> str:
    """Return a digest of the names, sizes and times of the files of a folder, two levels deep."""
    lines = []
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        status = path.stat()
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            lines.append(f"{name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
