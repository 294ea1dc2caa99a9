"""`apecache report`: one page for one run or several, of heads or of towers.

Without a store it shows what the runs know: the dev split, on which epochs were chosen. With one it
measures, by default on that dev split again, and shows pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_type, wrong_type
from apecache.data.images import load_image
from apecache.data.media import Media, NoMedia, media_at
from apecache.errors import DataError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.metrics.protocols import Intervals, retrieval_hits, retrieval_intervals
from apecache.metrics.retrieval import RetrievalReport, retrieval_report
from apecache.metrics.statistics import RetrievalHits
from apecache.report.gallery import Gallery
from apecache.report.page import Chart, Page, Table, write_page
from apecache.report.records import (
    RunRecord,
    interval_table,
    read_records,
    retrieval_table,
    seeds_table,
    settings_table,
    summary_table,
)
from apecache.report.run_page import learning_charts, ledger_table, retrieval_galleries
from apecache.runs.load import load_run
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import choose_splits

CHOSEN_ON = "The epoch was chosen on these images: the figures are no measure of generalisation."


@dataclass(frozen=True)
class ReportSpec:
    """`store`: measure on it. `split`: of the store, in place of each run's own dev images.
    `media`: where pictures lie; None: where the store remembers them. `command`: shown as what made
    the page. `n_items`, `top`: queries of each gallery, and results of each query."""

    store: FeatureStore | None = None
    split: str | None = None
    media: Media | None = None
    title: str = ""
    command: str = ""
    n_items: int = 6
    top: int = 5
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class _Measured:
    report: RetrievalReport
    intervals: Intervals
    hits: RetrievalHits
    embedded: Embeddings


def report_page(runs: Sequence[AnyPath], out: AnyPath, spec: ReportSpec | None = None) -> Path:
    """Write the page of one or several finished runs.

    Raises:
        RunError: no finished run, or a damaged one. OptionError: a run given twice. DataError: runs
            whose dev split the
        store does not have, no such split, or nothing to show. MismatchError: a store of other
            encoders.
    """
    if not isinstance(runs, list | tuple):
        raise wrong_type(runs, "a list of run folders", "runs")
    folders = [as_path(run, f"runs[{number}]") for number, run in enumerate(runs)]
    out = as_path(out, "out")
    require_type(spec, ReportSpec, "spec", optional=True)
    spec = spec or ReportSpec()
    require_type(spec.store, FeatureStore, "store", optional=True)
    records = read_records(folders)
    measured = _measure_all(records, spec)
    reports = {name: found.report for name, found in measured.items()}
    reports = reports or {record.name: record.dev for record in records if record.dev}
    if not reports:
        raise DataError(
            f"{records[0].path} says nothing of a dev split (a combination?); give --store to "
            "measure it"
        )
    page = Page(
        title=spec.title or (records[0].name if len(records) == 1 else f"{len(records)} runs"),
        subtitle=_subtitle(records),
        commands=(spec.command,) if spec.command else (),
        tables=tuple(_tables(records, reports=reports, measured=measured, spec=spec)),
        charts=_charts(records),
        galleries=_galleries(measured, spec),
        notes=(*_notes(records, spec), *_left_out_notes(measured)),
    )
    return write_page(page, out)


def _galleries(measured: dict[str, _Measured], spec: ReportSpec) -> tuple[Gallery, ...]:
    """Of the run with the best mean recall."""
    if spec.store is None:
        return ()
    best = max(measured, key=lambda name: measured[name].report.mean_recall)
    found = retrieval_galleries(
        measured[best].embedded,
        store=spec.store,
        media=_media(spec),
        n_items=spec.n_items,
        top=spec.top,
    )
    of = f": {best}" if len(measured) > 1 else ""
    return tuple(replace(gallery, title=gallery.title + of) for gallery in found)


def _measure_all(records: Sequence[RunRecord], spec: ReportSpec) -> dict[str, _Measured]:
    store = spec.store
    return (
        {} if store is None else {record.name: _measure(record, store, spec) for record in records}
    )


def _measure(record: RunRecord, store: FeatureStore, spec: ReportSpec) -> _Measured:
    media = _media(spec)
    among = None if spec.split is not None else dev_images(record, store)
    run = load_run(record.path, spec.device)
    embedded = embed_store(
        run,
        store=store,
        split=spec.split,
        open_image=lambda key: load_image(key, media).image,
        among=among,
    )
    vectors = (embedded.image, embedded.text, embedded.image_of_text)
    relevance = embedded.relevance
    return _Measured(
        report=retrieval_report(*vectors, relevance=relevance),
        intervals=retrieval_intervals(*vectors, relevance=relevance),
        hits=retrieval_hits(*vectors, relevance=relevance),
        embedded=embedded,
    )


def dev_images(record: RunRecord, store: FeatureStore) -> NDArray[np.bool_]:
    """[n_images], those that the run's epoch was chosen on. Raises DataError if that cannot be
    known."""
    if not record.data:
        raise DataError(f"{record.path} knows no dev split; say what to measure on with --split")
    if record.data != store.digest:
        raise DataError(
            f"{record.path} was trained on another table than that of {store.path}; give --split"
        )
    content = next((equal_images(array) for array in store.arrays("image")), None)
    return choose_splits(store.pairs, record.splits, content)[1]


def _media(spec: ReportSpec) -> Media:
    if spec.media is not None or spec.store is None:
        return spec.media or NoMedia()
    return media_at(str(spec.store.source.get("root", "")))


def _tables(
    records: Sequence[RunRecord],
    reports: dict[str, RetrievalReport],
    measured: dict[str, _Measured],
    spec: ReportSpec,
) -> list[Table]:
    where = "dev split" if spec.split is None else f"split {spec.split}"
    seen = spec.split is None or any(_seen(record, spec) for record in records)
    tables = [
        summary_table(records),
        retrieval_table(f"Retrieval, {where}", reports, CHOSEN_ON if seen else ""),
    ]
    if measured:
        intervals = {name: found.intervals for name, found in measured.items()}
        tables.append(interval_table(intervals, next(iter(reports.values()))))
    hits = {name: found.hits for name, found in measured.items()}
    several = (
        (seeds_table(records, reports, hits), settings_table(records)) if len(records) > 1 else ()
    )
    tables += [table for table in several if table]
    costs = ledger_table({record.name: record.path for record in records})
    return [*tables, costs] if costs.rows else tables


def _charts(records: Sequence[RunRecord]) -> tuple[Chart, ...]:
    charts = learning_charts(
        {record.name: record.path for record in records},
        records[0].best_epoch if len(records) == 1 else None,
    )
    return tuple(chart for chart in charts if any(curve.points for curve in chart.curves))


def _seen(record: RunRecord, spec: ReportSpec) -> bool:
    """Whether the reported split was trained or chosen on."""
    used = (record.splits.train or "train", record.splits.dev)
    return spec.store is not None and record.data == spec.store.digest and spec.split in used


def _subtitle(records: Sequence[RunRecord]) -> str:
    encoders = {
        (r.settings.get("image encoder", ""), r.settings.get("text encoder", "")) for r in records
    }
    (image, text), *more = sorted(encoders)
    return f"{image} and {text}" + (f", and {len(more)} other pairs of encoders" if more else "")


def _left_out_notes(measured: dict[str, _Measured]) -> tuple[str, ...]:
    """What retrieval could not use, once where it is the same for all runs."""
    names_of: dict[str, list[str]] = {}
    for name, one in measured.items():
        names_of.setdefault(str(one.embedded.left_out), []).append(name)
    if len(names_of) == 1:
        (text,) = names_of
        return (f"{text[:1].upper()}{text[1:]}.",) if text else ()
    return tuple(f"{', '.join(names)}: {text}." for text, names in names_of.items() if text)


def _notes(records: Sequence[RunRecord], spec: ReportSpec) -> tuple[str, ...]:
    notes = []
    if spec.store is None:
        notes.append(
            "Figures are those of the training; give --store for intervals, pictures or "
            "another split."
        )
    elif isinstance(_media(spec), NoMedia):
        notes.append(
            f"{spec.store.path} does not know where its images lie now; give --root for pictures."
        )
    if len({(record.data, record.splits) for record in records}) > 1 and spec.split is None:
        notes.append(
            "These runs chose their epochs on different images: their figures are not to be "
            "compared."
        )
    return tuple(notes)
