"""What run folders say of themselves, side by side: what trained, figures, settings that differ,
seeds."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apecache.encoders.spec import EncoderSpec, looks_local
from apecache.errors import OptionError, RunError, one_line
from apecache.metrics.protocols import Intervals
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
"""Words about a recipe; they change nothing."""
NUMBERS = ("seed", "best_epoch", "n_trained_parameters", "n_train_images", "seconds")


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """`name` is unique among the runs of a page. `dev`: as training measured its best epoch; None
    for a combination, which says nothing of a training. `settings`: of recipe, encoders, splits and
    data by dotted name, without the seed. `encoders`: the digests of both fingerprints, image
    before text; names alone do not tell encoders apart.
    """

    name: str
    path: Path
    trains: str
    recipe: str
    settings: Mapping[str, str]
    data: str
    splits: SplitSpec
    encoders: tuple[str, str]
    seed: int | None = None
    best_epoch: int | None = None
    n_trained_parameters: int | None = None
    n_train_images: int | None = None
    seconds: float | None = None
    dev: RetrievalReport | None = None


def read_records(runs: Sequence[Path]) -> tuple[RunRecord, ...]:
    """Raises RunError for what is no finished run, OptionError for a run that is given twice."""
    return tuple(_read(name, path) for name, path in named_paths(runs).items())


def named_paths(runs: Sequence[Path]) -> dict[str, Path]:
    """Each run by the shortest end of its path that no other one has. Raises OptionError if one is
    given twice."""
    whole = [path.resolve().parts for path in runs]
    twice = [path for path, parts in zip(runs, whole, strict=True) if whole.count(parts) > 1]
    if twice:
        raise OptionError(f"{twice[0]} is given twice; give every run once")
    names = []
    for parts in whole:
        ends = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names.append(
            next(
                end
                for end in ends
                if Counter("/".join(p[-end.count("/") - 1 :]) for p in whole)[end] == 1
            )
        )
    return dict(zip(names, runs, strict=True))


def _read(name: str, path: Path) -> RunRecord:
    told = recorded_training(path)
    try:
        recipe: Any = told.get("recipe") or {}
        encoders = {side: recorded_encoder(path, side) for side in ("image", "text")}
        digests = (
            recorded_fingerprint(path, "image").digest,
            recorded_fingerprint(path, "text").digest,
        )
        return RunRecord(
            name=name,
            path=path,
            trains="towers" if is_encoder_run(path) else "heads",
            recipe=str(recipe.get("name", "combination")),
            settings=dict(_settings(told, recipe=recipe, encoders=encoders, digests=digests)),
            data=str(told.get("data", "")),
            splits=SplitSpec(**(told.get("splits") or {})),
            encoders=digests,
            dev=RetrievalReport.from_json(told["dev"]) if "dev" in told else None,
            **{name: _number(name, told.get(name)) for name in NUMBERS},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{path} does not say how it was trained ({one_line(error)}); train again"
        ) from None


def _number(name: str, value: Any) -> Any:
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{name} is no number")
    return value


def _settings(
    told: Mapping[str, Any],
    recipe: Mapping[str, Any],
    encoders: Mapping[str, EncoderSpec],
    digests: tuple[str, str],
) -> Iterator[tuple[str, str]]:
    for name, value in _flat("recipe", recipe):
        if name not in FREE:
            yield name.removeprefix("recipe."), value
    for (side, encoder), digest in zip(encoders.items(), digests, strict=True):
        yield f"{side} encoder", encoder_label(encoder, digest)
    yield from _flat("splits", told.get("splits") or {})
    yield "data", str(told.get("data", ""))[:16]


def encoder_label(encoder: EncoderSpec, digest: str) -> str:
    """Name an encoder with the settings that make its features others: pooling, layer, sizes,
    precision, prefix.

    Folders of one name can hold different encoders, so a local one is named with the end of its
    digest too.
    """
    usual = EncoderSpec(
        encoder.library,
        name=encoder.name,
        modality=encoder.modality,
        revision=encoder.revision,
    )
    names = ("pooling", "layer", "resolution", "max_tokens", "prefix", "resize", "dtype")
    changed = [
        f"{name} {getattr(encoder, name)}"
        for name in names
        if getattr(encoder, name) != getattr(usual, name)
    ]
    changed += [f"digest …{digest[-8:]}"] if looks_local(encoder.name) or encoder.folder else []
    return public_name(encoder) + (f" ({', '.join(changed)})" if changed else "")


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary_table(records: Sequence[RunRecord]) -> Table:
    """A line for each run: what trained, and how the epoch was chosen."""
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
    )
    rows = tuple(
        (
            *(
                r.name,
                r.recipe,
                r.trains,
                r.seed,
                r.best_epoch,
                r.n_trained_parameters,
                r.n_train_images,
            ),
            r.dev.mean_recall if r.dev else None,
            r.dev.mean_chance if r.dev else None,
            r.seconds,
        )
        for r in records
    )
    note = "dev recall: mean of R@1, 5 and 10 both ways, of the epoch that was chosen by it."
    return Table(
        title="Runs" if len(records) > 1 else "The run",
        columns=(*columns, "seconds"),
        rows=rows,
        note=note,
    )


def retrieval_table(title: str, reports: Mapping[str, RetrievalReport], note: str = "") -> Table:
    """Recalls of every run, and what a random order would have, once for each set of candidates."""
    rows: list[tuple[Cell, ...]] = []
    for name, report in reports.items():
        rows.append((name, *recalls(report), report.mean_recall, report.n_images, report.n_texts))
    for report in {(r.n_images, r.n_texts): r for r in reports.values()}.values():
        rows.append(
            ("chance", *chances(report), report.mean_chance, report.n_images, report.n_texts)
        )
    return Table(
        title=title,
        columns=("", *_columns(next(iter(reports.values()))), MEAN, "images", "captions"),
        rows=tuple(rows),
        note=note,
    )


def recalls(report: RetrievalReport) -> tuple[float, ...]:
    return (*report.image_to_text.values(), *report.text_to_image.values())


def chances(report: RetrievalReport) -> tuple[float, ...]:
    """Return what a random order would have, in the order of `recalls`."""
    return (*report.chance_image_to_text.values(), *report.chance_text_to_image.values())


def _columns(report: RetrievalReport) -> tuple[str, ...]:
    ks = list(report.image_to_text)
    return (
        *(f"image to text R@{k},\u00a0%" for k in ks),
        *(f"text to image R@{k},\u00a0%" for k in ks),
    )


def interval_table(intervals: Mapping[str, Intervals], report: RetrievalReport) -> Table:
    """Ends of the intervals, and medians of the ranks. `report`: of one run, for the columns."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            name,
            *(
                ends(*each)
                for way in (found.image_to_text, found.text_to_image)
                for each in way.values()
            ),
            ends(*found.mean_recall),
            found.median_rank_image_to_text,
            found.median_rank_text_to_image,
        )
        for name, found in intervals.items()
    )
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
    return Table(title="How sure that is", columns=columns, rows=rows, note=note)


def ends(low: float, high: float) -> str:
    return f"{low:.1f}\u00a0to\u00a0{high:.1f}"


def settings_table(records: Sequence[RunRecord]) -> Table | None:
    """The settings that are not the same in all runs, a column for each run; None if all are."""
    names = dict.fromkeys(name for record in records for name in record.settings)
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        values = [record.settings.get(name) for record in records]
        if len(set(values)) > 1:
            rows.append((name, *values))
    return (
        Table(
            title="Settings that differ",
            columns=("setting", *(r.name for r in records)),
            rows=tuple(rows),
        )
        if rows
        else None
    )


def seeds_table(
    records: Sequence[RunRecord],
    reports: Mapping[str, RetrievalReport],
    hits: Mapping[str, RetrievalHits] | None = None,
) -> Table | None:
    """Runs that differ in their seed alone, by mean and interval; None if there are none.

    The interval adds the variance over seeds to that over images (`apecache.metrics.statistics`).
    `hits`: the answers of each run; without them the variance over images is an upper bound.
    """
    groups: dict[tuple[object, ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.name in reports and record.seed is not None:
            groups[record.trains, record.encoders, *record.settings.items()].append(record)
    rows: list[tuple[Cell, ...]] = []
    chance_rows: dict[tuple[int, int], tuple[Cell, ...]] = {}
    for group in groups.values():
        if len({record.seed for record in group}) > 1:
            first = reports[group[0].name]
            answers = [hits[record.name] for record in group] if hits else []
            estimates = _estimates([reports[record.name] for record in group], answers)
            rows.append((_group_label(group), len(group), *map(_shown, estimates)))
            chance_cells = (f"{value:.1f}" for value in (*chances(first), first.mean_chance))
            chance_rows[first.n_images, first.n_texts] = ("chance", None, *chance_cells)
    if not rows:
        return None
    heads = ("recipe, encoders: runs", "seeds", *_columns(next(iter(reports.values()))), MEAN)
    bound = "" if hits else " That over images is an upper bound; give --store for the exact one."
    note = (
        "Mean, and in brackets its 95 % interval: variances over seeds and over images are added "
        f"(Student).{bound}"
    )
    return Table(
        title="Seeds of one recipe",
        columns=heads,
        rows=(*rows, *chance_rows.values()),
        note=note,
    )


def _group_label(group: Sequence[RunRecord]) -> str:
    settings = group[0].settings
    encoders = f"{settings.get('image encoder', '')} and {settings.get('text encoder', '')}"
    return f"{group[0].recipe}, {encoders}: {', '.join(record.name for record in group)}"


def _estimates(
    reports: Sequence[RetrievalReport],
    answers: Sequence[RetrievalHits],
) -> list[Estimate]:
    """Every recall, in the order of `recalls`, and their mean."""
    terms: list[Term] = [(way, k) for way in WAYS for k in getattr(reports[0], way)]
    if answers:
        return [estimate_recall(answers, metric) for metric in (*([term] for term in terms), terms)]
    columns = (
        *zip(*map(recalls, reports), strict=True),
        tuple(report.mean_recall for report in reports),
    )
    return [estimate_from_recalls(values, reports[0].n_images) for values in columns]


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.1f} ({ends(estimate.low, estimate.high)})"
