"""Compare two runs, or two groups of seeds, by paired differences of recalls on one split."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np
from PIL import Image

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import MismatchError, OptionError, counted
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.evaluate.left_out import LeftOut
from apecache.metrics.protocols import measure_retrieval
from apecache.metrics.retrieval import KS, RetrievalReport
from apecache.metrics.statistics import (
    LEVEL,
    WAYS,
    RetrievalHits,
    Term,
    satterthwaite,
    sign_flip_p_value,
    smallest_variance,
    student_p_value,
    student_quantile,
    variance_over_images,
)
from apecache.recipes.former_keys import with_former_keys
from apecache.runs.load import load_run, recorded_fingerprint, recorded_training
from apecache.store.reader import FeatureStore

METRICS: Mapping[str, tuple[Term, ...]] = {
    **{
        f"{direction.replace('_', ' ')} R@{k}": ((direction, k),)
        for direction, k in product(WAYS, KS)
    },
    "mean R@1": (("image_to_text", 1), ("text_to_image", 1)),
    "mean of all": tuple(product(WAYS, KS)),
}
SIGN_FLIPS = "sign flips over images"
STUDENT = "Student's t over seeds and images"


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """Compare one metric; all figures but `p_value` are in per cent or in points."""

    metric: str
    value_a: float
    """Mean over the seeds of side a."""
    value_b: float
    """Mean over the seeds of side b."""
    difference: float
    """`value_a` less `value_b`."""
    low: float
    """Lower end of the interval of `difference`; 95 % unless said otherwise."""
    high: float
    """Upper end of that interval."""
    p_value: float
    chance: float
    """The expected value of a random order."""


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Hold all metrics of two sides on one split."""

    split: str
    rows: tuple[MetricDifference, ...]
    n_images: int
    n_texts: int
    n_seeds_a: int
    n_seeds_b: int
    method: str
    """How the p-values are computed."""
    seen_in_training: tuple[str, ...]
    """Runs that trained, or chose their epoch, on the split."""
    left_out: LeftOut
    """Counts of images and captions of the split that no run embeds, by the first run's reasons."""


def compare_runs(
    run_a: AnyPath | Sequence[AnyPath],
    run_b: AnyPath | Sequence[AnyPath],
    store: FeatureStore,
    split: str = "val",
    *,
    device: str = "auto",
    open_image: Callable[[str], Image.Image] | None = None,
) -> RunComparison:
    """Compare two finished runs, or the seeds of two recipes, on a split of a store.

    Every side answers the same queries among the same candidates, so differences are taken image by
    image, each image with its captions. The 95 % interval of a difference adds the variance over
    seeds of both sides to that over images (`apecache.metrics.statistics` has the formula; seeds of
    two recipes are not paired). With one run on each side the p-value is that of a permutation test
    by sign flips over images; with several it is that of Student's t with the variance of the
    interval.

    Args:
        run_a: a run folder, or those of several seeds of one recipe.
        run_b: the same of the other side.
        store: the features of the split; every frozen encoder of the runs needs its own.
        split: the split to measure; choose one that no run trained or chose on.
        device: where the heads run.
        open_image: reads the image of a key, for runs whose image tower trained.

    Raises:
        OptionError: no run on a side, one given twice on a side, or a side that mixes recipes.
        MismatchError: runs of different training tables or splits, or that cannot answer the same
            queries.
        RunError, DataError, IncompleteError, DamagedError: as `load_run` and `embed_store` raise
            them.
    """
    require_type(store, FeatureStore, "store")
    paths_a = _as_paths(run_a, "run_a")
    paths_b = _as_paths(run_b, "run_b")
    trainings = {path: recorded_training(path) for path in (*paths_a, *paths_b)}
    # All checks come before the first embedding, which can take minutes.
    _require_seeds_of_one_recipe(paths_a, trainings)
    _require_seeds_of_one_recipe(paths_b, trainings)
    _require_same_data(trainings)
    reference: Embeddings | None = None
    reports: list[RetrievalReport] = []
    answers: dict[Path, RetrievalHits] = {}
    for path in trainings:
        embedded = embed_store(
            load_run(path, device),
            store=store,
            split=split,
            open_image=open_image,
        )
        # The first run sets the queries that all others must answer.
        reference = reference or embedded
        _require_same_queries(embedded, reference, path)
        vectors = (embedded.image, embedded.text, embedded.image_of_text)
        measured = measure_retrieval(*vectors, relevance=embedded.relevance)
        reports.append(measured.report)
        answers[path] = measured.hits
    left_out = reference.left_out if reference is not None else LeftOut()
    hits_a = [answers[path] for path in paths_a]
    hits_b = [answers[path] for path in paths_b]
    rows = []
    for metric, terms in METRICS.items():
        chance = _chance(reports[0], terms)
        rows.append(compare_hits(hits_a, hits_b, metric=metric, chance=chance))
    return RunComparison(
        split=split,
        rows=tuple(rows),
        n_images=reports[0].n_images,
        n_texts=reports[0].n_texts,
        n_seeds_a=len(hits_a),
        n_seeds_b=len(hits_b),
        method=SIGN_FLIPS if len(hits_a) == len(hits_b) == 1 else STUDENT,
        seen_in_training=tuple(
            str(path)
            for path, training in trainings.items()
            if was_split_seen(training, store.trained_digest(training.get("data")), split)
        ),
        # All runs embed the same rows, so they leave out the same ones.
        left_out=left_out,
    )


def compare_hits(
    hits_a: Sequence[RetrievalHits],
    hits_b: Sequence[RetrievalHits],
    *,
    metric: str,
    chance: float,
    level: float = LEVEL,
) -> MetricDifference:
    """Compare one metric of `METRICS` on both sides.

    Each side has one `RetrievalHits` for each seed. `level` is the share of intervals that hold the
    true difference: raise it where one of several comparisons decides.
    """
    terms = METRICS[metric]
    values_a = [hits.value(terms) for hits in hits_a]
    values_b = [hits.value(terms) for hits in hits_b]
    difference = fmean(values_a) - fmean(values_b)
    influence_a = _mean_over_seeds(hits_a, terms, "influence")
    influence_b = _mean_over_seeds(hits_b, terms, "influence")
    # Subtracted image by image: what is hard for both sides cancels.
    influence = influence_a - influence_b
    n_images = len(influence)
    # Without a floor, sides that answer every image alike would have an interval of width 0.
    of_images = max(variance_over_images(influence), smallest_variance(n_images))
    of_seeds_a = _variance_of_mean(values_a)
    of_seeds_b = _variance_of_mean(values_b)
    squared_error = of_images + (of_seeds_a + of_seeds_b)
    degrees = satterthwaite(
        [
            (of_seeds_a, len(values_a) - 1),
            (of_seeds_b, len(values_b) - 1),
            (of_images, n_images - 1),
        ]
    )
    half = student_quantile(degrees, level) * squared_error**0.5
    if len(hits_a) == len(hits_b) == 1:
        shares_a = _mean_over_seeds(hits_a, terms, "shares")
        shares_b = _mean_over_seeds(hits_b, terms, "shares")
        # Without a variance over seeds a permutation test needs no assumed distribution.
        p_value = sign_flip_p_value(shares_a - shares_b)
    else:
        p_value = student_p_value(difference, squared_error, degrees)
    return MetricDifference(
        metric=metric,
        value_a=fmean(values_a),
        value_b=fmean(values_b),
        difference=difference,
        low=max(-100.0, difference - half),
        high=min(100.0, difference + half),
        p_value=p_value,
        chance=chance,
    )


def _variance_of_mean(values: Sequence[float]) -> float:
    return variance(values) / len(values) if len(values) > 1 else 0.0


def was_split_seen(training: Mapping[str, Any], data: str, split: str | None) -> bool:
    """Return whether a run trained, or chose its epoch, on a split.

    Args:
        training: the record of the run.
        data: digest of the table that has the split.
        split: name of the split.
    """
    splits = training.get("splits") or {}
    seen_splits = (splits.get("train") or "train", splits.get("dev"))
    return training.get("data") == data and split in seen_splits


def _mean_over_seeds(runs: Sequence[RetrievalHits], terms: Sequence[Term], measure: str) -> Any:
    """Average `influence` or `shares`, float64 [n_images]."""
    return np.mean([getattr(hits, measure)(terms) for hits in runs], axis=0)


def _chance(report: RetrievalReport, terms: Sequence[Term]) -> float:
    return fmean(getattr(report, f"chance_{direction}")[k] for direction, k in terms)


def _as_paths(runs: AnyPath | Sequence[AnyPath], name: str) -> list[Path]:
    several = runs if isinstance(runs, list | tuple) else [runs]
    paths = [as_path(run, name) for run in several]
    if not paths:
        raise OptionError(
            "a side of the comparison has no run; give one run or several seeds for each side"
        )
    return paths


def _require_seeds_of_one_recipe(
    paths: Sequence[Path],
    trainings: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Refuse a side whose runs differ in more than their seed.

    Their spread would not be the spread over seeds.
    """
    if len(paths) < 2:
        return
    seeds = [trainings[path].get("seed") for path in paths]
    if None in seeds or len(set(seeds)) < len(seeds):
        shown = ", ".join(
            f"{path} has seed {seed}" for path, seed in zip(paths, seeds, strict=True)
        )
        raise OptionError(
            f"the runs of one side must be different seeds ({shown}); give each seed once"
        )
    for path in paths[1:]:
        for record_key in ("recipe", "encoders"):
            if _recorded(paths[0], trainings, record_key) != _recorded(path, trainings, record_key):
                raise OptionError(
                    f"{paths[0]} and {path} are on one side, but their {record_key} differ; "
                    "put seeds of one recipe on a side, and the other recipe on the other side"
                )


def _recorded(path: Path, trainings: Mapping[Path, Mapping[str, Any]], record_key: str) -> Any:
    # By fingerprint: one encoder can have several names, and one name several encoders.
    if record_key == "encoders":
        image_digest = recorded_fingerprint(path, "image").digest
        text_digest = recorded_fingerprint(path, "text").digest
        return [image_digest, text_digest]
    # Earlier versions recorded recipes without the keys that came later.
    return with_former_keys(trainings[path].get(record_key))


def _require_same_data(trainings: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse runs of different tables or splits. A combination records neither, so it passes."""
    recorded = {path: training for path, training in trainings.items() if training.get("data")}
    if not recorded:
        return
    first, *other_paths = recorded
    for path in other_paths:
        for field, words in (("data", "tables"), ("splits", "splits")):
            own_record = recorded[path].get(field)
            first_record = recorded[first].get(field)
            if own_record != first_record:
                raise MismatchError(
                    f"{first} and {path} were trained on different {words}, so a difference is "
                    "not that of the "
                    "recipes; fit both on one store with the same split options",
                    [(field, own_record, first_record)],
                )


def _require_same_queries(embedded: Embeddings, reference: Embeddings, path: Path) -> None:
    same_images = np.array_equal(embedded.image_rows, reference.image_rows)
    same_texts = np.array_equal(embedded.text_rows, reference.text_rows)
    if not (same_images and same_texts):
        raise MismatchError(
            f"{path} can embed {counted(len(embedded.image_rows), 'image')} and "
            f"{len(embedded.text_rows)} "
            "captions of the split, "
            f"the first run {len(reference.image_rows)} and {len(reference.text_rows)}, or other "
            "ones; "
            "a paired comparison needs the same: repair the store with apecache repair"
        )
