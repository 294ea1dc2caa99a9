"""Read run folders and compare them in tables: what trained, figures, settings, seeds."""

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apecache.encoders.spec import EncoderSpec, looks_local
from apecache.errors import OptionError, RunError, one_line
from apecache.metrics.protocols import RecallIntervals
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.statistics import (
    WAYS,
    Estimate,
    RetrievalHits,
    Term,
    estimate_from_recalls,
    estimate_recall,
)
from apecache.report.page import Cell, Table
from apecache.runs.load import (
    is_encoder_run,
    recorded_encoder,
    recorded_fingerprint,
    recorded_training,
)
from apecache.runs.model_card import public_name
from apecache.train.batches import SplitSpec

MEAN = "mean of all"
FREE = ("recipe.name", "recipe.summary", "recipe.source")
"""Texts that describe a recipe; they change no result."""
NUMBERS = ("seed", "best_epoch", "n_trained_parameters", "n_train_images", "seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Hold what a run folder records of its training."""

    name: str
    """Unique among the runs of a page."""
    path: Path
    trains: str
    """`towers` or `heads`."""
    recipe: str
    settings: Mapping[str, str]
    """Of recipe, encoders, splits and data by dotted name, without the seed."""
    data: str
    """Digest of the table; empty for a combination."""
    splits: SplitSpec
    encoders: tuple[str, str]
    """Digests of the fingerprints of image and text; names alone do not tell encoders apart."""
    seed: int | None = None
    best_epoch: int | None = None
    n_trained_parameters: int | None = None
    n_train_images: int | None = None
    seconds: float | None = None
    dev: RetrievalReport | None = None
    """As training measured the best epoch; None for a combination, which was not trained."""


def read_records(runs: Sequence[Path]) -> tuple[RunRecord, ...]:
    """Read the records of finished runs.

    Raises:
        RunError: a folder is not a finished run.
        OptionError: a run is given twice.
    """
    return tuple(_read(name, path) for name, path in named_paths(runs).items())


def named_paths(runs: Sequence[Path]) -> dict[str, Path]:
    """Name each run by the shortest end of its path that no other run has.

    Raises:
        OptionError: a run is given twice.
    """
    all_steps = [path.resolve().parts for path in runs]
    for path, steps in zip(runs, all_steps, strict=True):
        if all_steps.count(steps) > 1:
            raise OptionError(f"{path} is given twice; give every run once")
    names = [_shortest_name(steps, all_steps) for steps in all_steps]
    return dict(zip(names, runs, strict=True))


def _shortest_name(steps: tuple[str, ...], all_steps: Sequence[tuple[str, ...]]) -> str:
    """Return the shortest end of one of the paths that is the end of no other one."""
    for length in range(1, len(steps)):
        ends_of_length = [other[-length:] for other in all_steps]
        if ends_of_length.count(steps[-length:]) == 1:
            return "/".join(steps[-length:])
    return "/".join(steps)


def _read(name: str, path: Path) -> RunRecord:
    training = recorded_training(path)
    try:
        recipe: Any = training.get("recipe") or {}
        encoders = {
            "image": recorded_encoder(path, "image"),
            "text": recorded_encoder(path, "text"),
        }
        digests = (
            recorded_fingerprint(path, "image").digest,
            recorded_fingerprint(path, "text").digest,
        )
        return RunRecord(
            name=name,
            path=path,
            trains="towers" if is_encoder_run(path) else "heads",
            recipe=str(recipe.get("name", "combination")),
            settings=dict(_settings(training, recipe=recipe, encoders=encoders, digests=digests)),
            data=str(training.get("data", "")),
            splits=SplitSpec(**(training.get("splits") or {})),
            encoders=digests,
            dev=RetrievalReport.from_json(training["dev"]) if "dev" in training else None,
            **{field: _number(field, training.get(field)) for field in NUMBERS},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} does not say how it was trained ({one_line(error)}); train again"
        ) from None


def _number(name: str, value: Any) -> Any:
    # Not isinstance: true would pass as an integer.
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{name} is not a number")
    return value


def _settings(
    training: Mapping[str, Any],
    recipe: Mapping[str, Any],
    encoders: Mapping[str, EncoderSpec],
    digests: tuple[str, str],
) -> Iterator[tuple[str, str]]:
    for name, value in _flat("recipe", recipe):
        if name not in FREE:
            yield name.removeprefix("recipe."), value
    for (side, encoder), digest in zip(encoders.items(), digests, strict=True):
        yield f"{side} encoder", encoder_label(encoder, digest)
    yield from _flat("splits", training.get("splits") or {})
    yield "data", str(training.get("data", ""))[:16]


def encoder_label(encoder: EncoderSpec, digest: str) -> str:
    """Name an encoder with the settings that change its features, such as pooling and prefix.

    Two folders of the same name can hold different encoders, so the label of a local encoder also
    has the end of its digest.
    """
    usual = EncoderSpec(
        encoder.library,
        name=encoder.name,
        modality=encoder.modality,
        revision=encoder.revision,
    )
    names = ("pooling", "layer", "resolution", "max_tokens", "prefix", "resize", "dtype")
    remarks = []
    for name in names:
        value = getattr(encoder, name)
        if value != getattr(usual, name):
            remarks.append(f"{name} {value}")
    if looks_local(encoder.name) or encoder.folder:
        remarks.append(f"digest …{digest[-8:]}")
    label = public_name(encoder)
    return f"{label} ({', '.join(remarks)})" if remarks else label


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Yield the values of nested dictionaries with their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary_table(records: Sequence[RunRecord]) -> Table:
    """Make a table with a line for each run: what trained, and how the epoch was chosen."""
    columns = (
        "run",
        "recipe",
        "trained",
        "seed",
        "best epoch",
        "parameters",
        "train images",
        "dev recall, %",
        "chance, %",
        "seconds",
    )
    rows: list[tuple[Cell, ...]] = []
    for record in records:
        cells: tuple[Cell, ...] = (
            record.name,
            record.recipe,
            record.trains,
            record.seed,
            record.best_epoch,
            record.n_trained_parameters,
            record.n_train_images,
            record.dev.mean_recall if record.dev else None,
            record.dev.mean_chance if record.dev else None,
            record.seconds,
        )
        rows.append(cells)
    note = "dev recall: mean of R@1, 5 and 10 both ways, of the epoch that was chosen by it."
    return Table(
        title="Runs" if len(records) > 1 else "The run",
        columns=columns,
        rows=tuple(rows),
        note=note,
    )


def retrieval_table(title: str, reports: Mapping[str, RetrievalReport], note: str = "") -> Table:
    """Make a table of the recalls of every run.

    What a random order would have stands below, once for each set of candidates.
    """
    rows: list[tuple[Cell, ...]] = []
    for name, report in reports.items():
        rows.append((name, *recalls(report), report.mean_recall, report.n_images, report.n_texts))
    # Chance depends on the numbers of candidates alone.
    by_candidates = {(report.n_images, report.n_texts): report for report in reports.values()}
    for (n_images, n_texts), report in by_candidates.items():
        rows.append(("chance", *chances(report), report.mean_chance, n_images, n_texts))
    first_report = next(iter(reports.values()))
    return Table(
        title=title,
        columns=("", *_columns(first_report), MEAN, "images", "captions"),
        rows=tuple(rows),
        note=note,
    )


def recalls(report: RetrievalReport) -> tuple[float, ...]:
    """Return R@k from image to text, then from text to image, by rising k."""
    return (*report.image_to_text.values(), *report.text_to_image.values())


def chances(report: RetrievalReport) -> tuple[float, ...]:
    """Return what a random order would have, in the order of `recalls`."""
    return (*report.chance_image_to_text.values(), *report.chance_text_to_image.values())


def _columns(report: RetrievalReport) -> tuple[str, ...]:
    columns: list[str] = []
    for direction in ("image to text", "text to image"):
        columns += [f"{direction} R@{k},\u00a0%" for k in report.image_to_text]
    return tuple(columns)


def interval_table(intervals: Mapping[str, RecallIntervals], report: RetrievalReport) -> Table:
    """Make a table of the ends of the intervals and the medians of the ranks.

    Args:
        intervals: of each run, by its name.
        report: of one run, for the columns.
    """
    rows: list[tuple[Cell, ...]] = []
    for name, run_intervals in intervals.items():
        of_recalls = (
            *run_intervals.image_to_text.values(),
            *run_intervals.text_to_image.values(),
            run_intervals.mean_recall,
        )
        cells: tuple[Cell, ...] = (
            name,
            *(ends(low, high) for low, high in of_recalls),
            run_intervals.median_rank_image_to_text,
            run_intervals.median_rank_text_to_image,
        )
        rows.append(cells)
    columns = (
        "",
        *_columns(report),
        MEAN,
        "median rank, image to text",
        "median rank, text to image",
    )
    note = (
        "95 % intervals over images, each with its captions (Wilson, effective number of "
        "queries); one run has no "
        "variance over seeds. Rank 1 is first."
    )
    return Table(title="How sure that is", columns=columns, rows=tuple(rows), note=note)


def ends(low: float, high: float) -> str:
    """Return the ends of an interval in one line."""
    # Spaces that do not break keep an interval together in a narrow column.
    return f"{low:.1f}\u00a0to\u00a0{high:.1f}"


def settings_table(records: Sequence[RunRecord]) -> Table | None:
    """Make a table of the settings that differ between runs, a column for each; None: none do."""
    # A dictionary, not a set, keeps the order of the settings.
    names: dict[str, None] = {}
    for record in records:
        names.update(dict.fromkeys(record.settings))
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        values = [record.settings.get(name) for record in records]
        if len(set(values)) > 1:
            rows.append((name, *values))
    if not rows:
        return None
    return Table(
        title="Settings that differ",
        columns=("setting", *(record.name for record in records)),
        rows=tuple(rows),
    )


def seeds_table(
    records: Sequence[RunRecord],
    reports: Mapping[str, RetrievalReport],
    hits: Mapping[str, RetrievalHits] | None = None,
) -> Table | None:
    """Make a table of runs that differ in their seed alone: mean and interval; None: none do.

    The interval adds the variance over seeds to that over images (`apecache.metrics.statistics`).

    Args:
        records: of all runs.
        reports: by run name; runs that are missing here are left out.
        hits: the answers of each run. Without them the variance over images is an upper bound.
    """
    groups: dict[tuple[object, ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.name in reports and record.seed is not None:
            groups[record.trains, record.encoders, *record.settings.items()].append(record)
    rows: list[tuple[Cell, ...]] = []
    chance_rows: dict[tuple[int, int], tuple[Cell, ...]] = {}
    for group in groups.values():
        seeds = {record.seed for record in group}
        if len(seeds) < 2:
            continue
        first = reports[group[0].name]
        group_reports = [reports[record.name] for record in group]
        answers = [hits[record.name] for record in group] if hits else []
        estimates = _estimates(group_reports, answers)
        rows.append((_group_label(group), len(group), *map(_shown, estimates)))
        # As text, like the estimates above them in the table.
        chance_cells = (f"{value:.1f}" for value in (*chances(first), first.mean_chance))
        chance_rows[first.n_images, first.n_texts] = ("chance", None, *chance_cells)
    if not rows:
        return None
    first_report = next(iter(reports.values()))
    headings = ("recipe, encoders: runs", "seeds", *_columns(first_report), MEAN)
    bound = "" if hits else " That over images is an upper bound; give --store for the exact one."
    note = (
        "Mean, and in brackets its 95 % interval: variances over seeds and over images are added "
        f"(Student).{bound}"
    )
    return Table(
        title="Seeds of one recipe",
        columns=headings,
        rows=(*rows, *chance_rows.values()),
        note=note,
    )


def _group_label(group: Sequence[RunRecord]) -> str:
    settings = group[0].settings
    encoders = f"{settings.get('image encoder', '')} and {settings.get('text encoder', '')}"
    names = ", ".join(record.name for record in group)
    return f"{group[0].recipe}, {encoders}: {names}"


def _estimates(
    reports: Sequence[RetrievalReport],
    answers: Sequence[RetrievalHits],
) -> list[Estimate]:
    """Estimate every recall, in the order of `recalls`, and their mean.

    Args:
        reports: of each seed.
        answers: of each seed; empty: the estimates come from the recalls alone.
    """
    terms: list[Term] = []
    for direction in WAYS:
        for k in getattr(reports[0], direction):
            terms.append((direction, k))
    if answers:
        estimates = [estimate_recall(answers, [term]) for term in terms]
        # The mean is estimated from all answers, not from the estimates: recalls of the same images
        # depend on each other.
        estimates.append(estimate_recall(answers, terms))
        return estimates
    by_metric = [
        *zip(*map(recalls, reports), strict=True),
        tuple(report.mean_recall for report in reports),
    ]
    return [estimate_from_recalls(values, reports[0].n_images) for values in by_metric]


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.1f} ({ends(estimate.low, estimate.high)})"
