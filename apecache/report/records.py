"""What run folders say of themselves, side by side: what trained, figures, settings that differ, seeds."""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from apecache.encoders.spec import EncoderSpec
from apecache.errors import OptionError, RunError, one_line
from apecache.evaluate.protocols import Intervals
from apecache.evaluate.retrieval import RetrievalReport
from apecache.recipes.runs import is_encoder_run, recorded_encoder, recorded_training
from apecache.report.page import Cell, Table
from apecache.sweep_results import interval
from apecache.train.batches import SplitSpec
from apecache.train.model_card import public_name

MEAN = "mean of all"
FREE = ("recipe.name", "recipe.summary", "recipe.source")
"""Words about a recipe; they change nothing."""
NUMBERS = ("seed", "best_epoch", "n_trained_parameters", "n_train_images", "seconds")


@dataclass(frozen=True)
class RunRecord:
    """`name` is unique among the runs of a page. `dev`: as training measured its best epoch; None for a combination,
    which says nothing of a training. `settings`: of recipe, encoders, splits and data by dotted name, without the seed.
    """

    name: str
    path: Path
    trains: str
    recipe: str
    settings: Mapping[str, str]
    data: str
    splits: SplitSpec
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
    """Each run by the shortest end of its path that no other one has. Raises OptionError if one is given twice."""
    whole = [path.resolve().parts for path in runs]
    twice = [path for path, parts in zip(runs, whole, strict=True) if whole.count(parts) > 1]
    if twice:
        raise OptionError(f"{twice[0]} is given twice; give every run once")
    names = []
    for parts in whole:
        ends = ("/".join(parts[-n:]) for n in range(1, len(parts) + 1))
        names.append(next(end for end in ends if Counter("/".join(p[-end.count("/") - 1 :]) for p in whole)[end] == 1))
    return dict(zip(names, runs, strict=True))


def _read(name: str, path: Path) -> RunRecord:
    told = recorded_training(path)
    try:
        recipe: Any = told.get("recipe") or {}
        encoders = {side: recorded_encoder(path, side) for side in ("image", "text")}
        return RunRecord(
            name,
            path,
            "towers" if is_encoder_run(path) else "heads",
            str(recipe.get("name", "combination")),
            dict(_settings(told, recipe, encoders)),
            str(told.get("data", "")),
            SplitSpec(**(told.get("splits") or {})),
            dev=RetrievalReport.from_json(told["dev"]) if "dev" in told else None,
            **{name: _number(name, told.get(name)) for name in NUMBERS},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} does not say how it was trained ({one_line(error)}); train again") from None


def _number(name: str, value: Any) -> Any:
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{name} is no number")
    return value


def _settings(
    told: Mapping[str, Any], recipe: Mapping[str, Any], encoders: Mapping[str, EncoderSpec]
) -> Iterator[tuple[str, str]]:
    for name, value in _flat("recipe", recipe):
        if name not in FREE:
            yield name.removeprefix("recipe."), value
    for side, encoder in encoders.items():
        yield f"{side} encoder", public_name(encoder)
    yield from _flat("splits", told.get("splits") or {})
    yield "data", str(told.get("data", ""))[:16]


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def summary_table(records: Sequence[RunRecord]) -> Table:
    """A line for each run: what trained, and how the epoch was chosen."""
    columns = ("run", "recipe", "trained", "seed", "best epoch", "parameters", "train images", "dev recall, %")
    rows = tuple(
        (
            *(r.name, r.recipe, r.trains, r.seed, r.best_epoch, r.n_trained_parameters, r.n_train_images),
            r.dev.mean_recall if r.dev else None,
            r.seconds,
        )
        for r in records
    )
    note = "dev recall: mean of R@1, 5 and 10 both ways, of the epoch that was chosen by it."
    return Table("Runs" if len(records) > 1 else "The run", (*columns, "seconds"), rows, note)


def retrieval_table(title: str, reports: Mapping[str, RetrievalReport], note: str = "") -> Table:
    """Recalls of every run, and what a random order would have, once for each set of candidates."""
    rows: list[tuple[Cell, ...]] = []
    for name, report in reports.items():
        rows.append((name, *recalls(report), report.mean_recall, report.n_images, report.n_texts))
    for report in {(r.n_images, r.n_texts): r for r in reports.values()}.values():
        chance = (*report.chance_image_to_text.values(), *report.chance_text_to_image.values())
        rows.append(("chance", *chance, fmean(chance), report.n_images, report.n_texts))
    return Table(title, ("", *_columns(next(iter(reports.values()))), MEAN, "images", "captions"), tuple(rows), note)


def recalls(report: RetrievalReport) -> tuple[float, ...]:
    return (*report.image_to_text.values(), *report.text_to_image.values())


def _columns(report: RetrievalReport) -> tuple[str, ...]:
    ks = list(report.image_to_text)
    return (*(f"image to text R@{k},\u00a0%" for k in ks), *(f"text to image R@{k},\u00a0%" for k in ks))


def interval_table(intervals: Mapping[str, Intervals], report: RetrievalReport) -> Table:
    """Ends of the intervals, and medians of the ranks."""
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            name,
            *(ends(*each) for way in (found.image_to_text, found.text_to_image) for each in way.values()),
            found.median_rank_image_to_text,
            found.median_rank_text_to_image,
        )
        for name, found in intervals.items()
    )
    columns = ("", *_columns(report), "median rank, image to text", "median rank, text to image")
    note = "95 % intervals by bootstrap over images, each with its captions; rank 1 is first."
    return Table("How sure that is", columns, rows, note)


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
    return Table("Settings that differ", ("setting", *(r.name for r in records)), tuple(rows)) if rows else None


def seeds_table(records: Sequence[RunRecord], reports: Mapping[str, RetrievalReport]) -> Table | None:
    """Runs that differ in their seed alone, by mean and interval; None if there are none."""
    groups: dict[tuple[object, ...], list[RunRecord]] = defaultdict(list)
    for record in records:
        if record.name in reports and record.seed is not None:
            groups[record.trains, *record.settings.items()].append(record)
    rows: list[tuple[Cell, ...]] = []
    for group in groups.values():
        if len({record.seed for record in group}) > 1:
            found = [reports[record.name] for record in group]
            label = f"{group[0].recipe}: {', '.join(record.name for record in group)}"
            columns = (*zip(*(recalls(report) for report in found), strict=True), [r.mean_recall for r in found])
            rows.append((label, len(group), *(_mean(values) for values in columns)))
    if not rows:
        return None
    heads = ("recipe: runs", "seeds", *_columns(next(iter(reports.values()))), MEAN)
    note = "Mean, and in brackets its 95 % interval over seeds (Student)."
    return Table("Seeds of one recipe", heads, tuple(rows), note)


def _mean(values: Sequence[float]) -> str:
    found = interval(values)
    return f"{found['mean']:.1f} ({ends(found['low'], found['high'])})"
