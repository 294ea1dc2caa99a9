"""Write the page of one run or several, of heads or of towers, for `apecache report`.

Without a store the page shows what the runs record: figures of the dev split, on which epochs were
chosen. With a store it measures, by default on the same dev split, and shows pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type, wrong_type
from apecache.data.images import load_image
from apecache.data.media import Media, NoMedia
from apecache.data.recorded import recorded_media
from apecache.errors import DataError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.export.benchmark_suite import read_suites
from apecache.export.datacomp import DATACOMP
from apecache.metrics.protocols import RecallIntervals, measure_retrieval
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.statistics import RetrievalHits
from apecache.report.gallery import Gallery
from apecache.report.page import Cell, Chart, Page, Table, write_page
from apecache.report.records import (
    RunRecord,
    ends,
    interval_table,
    read_records,
    retrieval_table,
    seeds_table,
    settings_table,
    summary_table,
)
from apecache.report.run_page import (
    learning_charts,
    ledger_table,
    retrieval_galleries,
    with_points,
)
from apecache.runs.load import load_run
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import choose_splits

N_DATACOMP = len(DATACOMP)
CHOSEN_ON = "The epoch was chosen on these images: the figures are no measure of generalization."


@dataclass(frozen=True)
class ReportSpec:
    """Choose what a page shows and where it is measured."""

    store: FeatureStore | None = None
    """Measure on it; None: show the runs' recorded figures."""
    split: str | None = None
    """Of the store; None: the dev images of each run."""
    media: Media | None = None
    """Where pictures lie; None: where the store recorded them."""
    title: str = ""
    command: str = ""
    """Shown as the command that made the page."""
    n_items: int = 6
    """Queries of each gallery."""
    top: int = 5
    """Results of each query."""
    device: str = "auto"
    baseline: str | None = None
    """A ready-made model that is measured beside the runs, on the images of the first one."""


@dataclass(frozen=True, kw_only=True)
class _RunMeasurements:
    """Hold what was measured of a run on the store."""

    report: RetrievalReport
    intervals: RecallIntervals
    hits: RetrievalHits
    embedded: Embeddings


def report_page(runs: Sequence[AnyPath], out: AnyPath, spec: ReportSpec | None = None) -> Path:
    """Write the page of one or several finished runs.

    Raises:
        RunError: a folder is not a finished run, or a damaged one.
        OptionError: a run is given twice.
        DataError: the store lacks a run's dev split or the given split; or nothing can be shown.
        MismatchError: the store is of other encoders than a run.
    """
    if not isinstance(runs, list | tuple):
        raise wrong_type(runs, "a list of run folders", "runs")
    folders = [as_path(run, f"runs[{number}]") for number, run in enumerate(runs)]
    out = as_path(out, "out")
    require_spec(spec, ReportSpec, "spec", optional=True)
    spec = spec or ReportSpec()
    require_type(spec.store, FeatureStore, "store", optional=True)
    # Once: a source that its images come with takes a while to open.
    spec = replace(spec, media=_media(spec))
    records = read_records(folders)
    measured = _measure_all(records, spec)
    reports = {name: run.report for name, run in measured.items()}
    # Without a store the page shows what the runs recorded of their dev split.
    if not reports:
        reports = {record.name: record.dev for record in records if record.dev}
    if not reports:
        raise DataError(
            f"{records[0].path} says nothing of a dev split (a combination?); give --store to "
            "measure it"
        )
    default_title = records[0].name if len(records) == 1 else f"{len(records)} runs"
    page = Page(
        title=spec.title or default_title,
        subtitle=_subtitle(records),
        commands=(spec.command,) if spec.command else (),
        tables=tuple(_tables(records, reports=reports, measured=measured, spec=spec)),
        charts=_charts(records),
        galleries=_galleries(measured, spec),
        notes=(*_notes(records, spec), *_left_out_notes(measured)),
    )
    return write_page(page, out)


def _galleries(measured: dict[str, _RunMeasurements], spec: ReportSpec) -> tuple[Gallery, ...]:
    """Make the galleries of the run with the best mean recall."""
    if spec.store is None:
        return ()
    # A ready-made model is listed last, and is not what the page is about.
    of_runs = list(measured)[: -1 if spec.baseline else None]
    best = max(of_runs, key=lambda name: measured[name].report.mean_recall)
    galleries = retrieval_galleries(
        measured[best].embedded,
        store=spec.store,
        media=_media(spec),
        n_items=spec.n_items,
        top=spec.top,
    )
    suffix = f": {best}" if len(of_runs) > 1 else ""
    return tuple(replace(gallery, title=gallery.title + suffix) for gallery in galleries)


def _measure_all(records: Sequence[RunRecord], spec: ReportSpec) -> dict[str, _RunMeasurements]:
    store = spec.store
    if store is None:
        return {}
    measured = {record.name: _measure(record, store, spec) for record in records}
    if spec.baseline is not None:
        # The baseline is measured on the images and captions of the first run.
        first = measured[records[0].name]
        measured[f"{spec.baseline} (ready-made)"] = _measure_baseline(first, store, spec)
    return measured


def _measure_baseline(
    first: _RunMeasurements,
    store: FeatureStore,
    spec: ReportSpec,
) -> _RunMeasurements:
    from apecache.evaluate.baseline import embed_baseline, load_baseline

    assert spec.baseline is not None
    media = _media(spec)
    baseline = load_baseline(spec.baseline, spec.device)
    embedded = embed_baseline(
        baseline,
        store=store,
        reference=first.embedded,
        open_image=lambda key: load_image(key, media).image,
    )
    return _measurements(embedded)


def _measure(record: RunRecord, store: FeatureStore, spec: ReportSpec) -> _RunMeasurements:
    media = _media(spec)
    # Before the run is loaded, which takes a while: a missing dev split is an early error.
    among = None if spec.split is not None else dev_images(record, store)
    run = load_run(record.path, spec.device)
    embedded = embed_store(
        run,
        store=store,
        split=spec.split,
        open_image=lambda key: load_image(key, media).image,
        among=among,
    )
    return _measurements(embedded)


def _measurements(embedded: Embeddings) -> _RunMeasurements:
    vectors = (embedded.image, embedded.text, embedded.image_of_text)
    measured = measure_retrieval(*vectors, relevance=embedded.relevance)
    return _RunMeasurements(
        report=measured.report,
        intervals=measured.intervals,
        hits=measured.hits,
        embedded=embedded,
    )


def dev_images(record: RunRecord, store: FeatureStore) -> NDArray[np.bool_]:
    """Return which images the run's epoch was chosen on, as a mask [n_images].

    Raises:
        DataError: it cannot be known.
    """
    if not record.data:
        raise DataError(f"{record.path} knows no dev split; say what to measure on with --split")
    if record.data != store.digest:
        raise DataError(
            f"{record.path} was trained on another table than that of {store.path}; give --split"
            f"{store.hint(record.data)}"
        )
    content = next((equal_images(array) for array in store.arrays("image")), None)
    _, dev = choose_splits(store.pairs, record.splits, content)
    return dev


def _media(spec: ReportSpec) -> Media:
    if spec.media is not None or spec.store is None:
        return spec.media or NoMedia()
    return recorded_media(spec.store.last_source)


def _tables(
    records: Sequence[RunRecord],
    reports: dict[str, RetrievalReport],
    measured: dict[str, _RunMeasurements],
    spec: ReportSpec,
) -> list[Table]:
    split_name = "dev split" if spec.split is None else f"split {spec.split}"
    # Recalls on images that were trained or chosen on need the warning beside them.
    was_seen = spec.split is None or any(_seen(record, spec) for record in records)
    note = CHOSEN_ON if was_seen else ""
    tables = [
        summary_table(records),
        retrieval_table(f"Retrieval, {split_name}", reports, note),
    ]
    if measured:
        intervals = {name: run.intervals for name, run in measured.items()}
        tables.append(interval_table(intervals, next(iter(reports.values()))))
    if len(records) > 1:
        hits = {name: run.hits for name, run in measured.items()}
        for table in (seeds_table(records, reports, hits), settings_table(records)):
            if table is not None:
                tables.append(table)
    tables += suite_tables(_paths(records))
    costs = ledger_table(_paths(records))
    return [*tables, costs] if costs.rows else tables


def suite_tables(paths: Mapping[str, Path]) -> list[Table]:
    """Make a table per suite of `apecache evaluate --suite` that a run has results of."""
    rows: dict[str, list[tuple[Cell, ...]]] = {}
    for name, path in paths.items():
        for report in read_suites(path):
            for row in report.rows:
                metric = row.shown
                span = row.intervals.get(metric)
                cells = (
                    name,
                    f"{row.title} ({row.source})" if row.source else row.title,
                    metric,
                    100 * row.metrics[metric],
                    ends(100 * span[0], 100 * span[1]) if span else "",
                )
                rows.setdefault(report.suite, []).append((*cells, row.n_images))
            if report.main_score is not None:
                # The score is DataComp's only if all of its tasks were measured.
                n_measured = N_DATACOMP - len(report.missing)
                title = f"mean of the {n_measured} measured of {N_DATACOMP} tasks"
                rows[report.suite].append((name, title, "", 100 * report.main_score, "", ""))
    columns = ("run", "data set", "figure", "%", "95 % interval", "images")
    return [
        Table(title=f"Suite {suite}", columns=columns, rows=tuple(suite_rows))
        for suite, suite_rows in rows.items()
    ]


def _charts(records: Sequence[RunRecord]) -> tuple[Chart, ...]:
    # Several runs have several best epochs, which one marker cannot show.
    best_epoch = records[0].best_epoch if len(records) == 1 else None
    return tuple(with_points(learning_charts(_paths(records), best_epoch)))


def _paths(records: Sequence[RunRecord]) -> dict[str, Path]:
    return {record.name: record.path for record in records}


def _seen(record: RunRecord, spec: ReportSpec) -> bool:
    """Tell whether the run was trained, or its epoch chosen, on the reported split."""
    used = (record.splits.train or "train", record.splits.dev)
    if spec.store is None or spec.split not in used:
        return False
    return bool(record.data) and record.data == spec.store.trained_digest(record.data)


def _subtitle(records: Sequence[RunRecord]) -> str:
    encoder_pairs = set()
    for record in records:
        settings = record.settings
        encoder_pairs.add((settings.get("image encoder", ""), settings.get("text encoder", "")))
    (image, text), *other_pairs = sorted(encoder_pairs)
    remark = f", and {len(other_pairs)} other pairs of encoders" if other_pairs else ""
    return f"{image} and {text}{remark}"


def _left_out_notes(measured: dict[str, _RunMeasurements]) -> tuple[str, ...]:
    """Say what retrieval could not use, once if it is the same for all runs."""
    names_of: dict[str, list[str]] = {}
    for name, run in measured.items():
        names_of.setdefault(str(run.embedded.left_out), []).append(name)
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
            f"{spec.store.path} does not know where its images lie now; give --root or "
            "--source for pictures."
        )
    if len({(record.data, record.splits) for record in records}) > 1 and spec.split is None:
        notes.append(
            "These runs chose their epochs on different images: their figures are not to be "
            "compared."
        )
    return tuple(notes)
