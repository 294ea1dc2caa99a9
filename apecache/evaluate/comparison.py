"""Compare two runs, or two groups of seeds, on the images of one split: paired differences of
recalls."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, variance
from typing import Any

import numpy as np
from PIL import Image

from apecache.errors import MismatchError, OptionError
from apecache.evaluate.embeddings import Embeddings, embed_store
from apecache.metrics.protocols import retrieval_hits
from apecache.metrics.retrieval import KS, RetrievalReport, retrieval_report
from apecache.metrics.statistics import (
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
from apecache.runs.load import load_run, recorded_fingerprint, recorded_training
from apecache.store.reader import FeatureStore

METRICS: Mapping[str, tuple[Term, ...]] = {
    **{f"{way.replace('_', ' ')} R@{k}": ((way, k),) for way, k in product(WAYS, KS)},
    "mean R@1": (("image_to_text", 1), ("text_to_image", 1)),
    "mean of all": tuple(product(WAYS, KS)),
}
SIGN_FLIPS = "sign flips over images"
STUDENT = "Student's t over seeds and images"


@dataclass(frozen=True, kw_only=True)
class MetricDifference:
    """Compare one metric; everything but `p_value` is in per cent or in points.

    `value_a`, `value_b`: the mean over seeds of each side. `difference`: `value_a` less `value_b`,
    with its 95 % interval `low` to `high`. `chance`: the expected value of a random order.
    """

    metric: str
    value_a: float
    value_b: float
    difference: float
    low: float
    high: float
    p_value: float
    chance: float


@dataclass(frozen=True, kw_only=True)
class RunComparison:
    """Hold all metrics of two sides on one split. `method`: how the p-values are computed.
    `seen_in_training`: runs that trained or chose on the split."""

    split: str
    rows: tuple[MetricDifference, ...]
    n_images: int
    n_texts: int
    n_seeds_a: int
    n_seeds_b: int
    method: str
    seen_in_training: tuple[str, ...]


def compare_runs(
    run_a: Path | Sequence[Path],
    run_b: Path | Sequence[Path],
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
    sides = [_as_paths(run_a), _as_paths(run_b)]
    trainings = {path: recorded_training(path) for paths in sides for path in paths}
    for paths in sides:
        _require_seeds_of_one_recipe(paths, trainings)
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
        reference = reference or embedded
        _require_same_queries(embedded, reference, path)
        vectors = (embedded.image, embedded.text, embedded.image_of_text)
        reports.append(retrieval_report(*vectors, relevance=embedded.relevance))
        answers[path] = retrieval_hits(*vectors, relevance=embedded.relevance)
    hits_a, hits_b = ([answers[path] for path in paths] for paths in sides)
    return RunComparison(
        split=split,
        rows=tuple(
            compare_hits(hits_a, hits_b, metric=metric, chance=_chance(reports[0], terms))
            for metric, terms in METRICS.items()
        ),
        n_images=reports[0].n_images,
        n_texts=reports[0].n_texts,
        n_seeds_a=len(hits_a),
        n_seeds_b=len(hits_b),
        method=SIGN_FLIPS if len(hits_a) == len(hits_b) == 1 else STUDENT,
        seen_in_training=tuple(
            str(path)
            for path, training in trainings.items()
            if was_split_seen(training, store.digest, split)
        ),
    )


def compare_hits(
    hits_a: Sequence[RetrievalHits],
    hits_b: Sequence[RetrievalHits],
    *,
    metric: str,
    chance: float,
) -> MetricDifference:
    """Compare one metric of `METRICS` on the answers of both sides, a `RetrievalHits` for each
    seed."""
    terms = METRICS[metric]
    values_a = [hits.value(terms) for hits in hits_a]
    values_b = [hits.value(terms) for hits in hits_b]
    difference = fmean(values_a) - fmean(values_b)
    influence = _mean_over_seeds(hits_a, terms, "influence") - _mean_over_seeds(
        hits_b,
        terms,
        "influence",
    )
    n_images = len(influence)
    of_images = max(variance_over_images(influence), smallest_variance(n_images))
    of_seeds = [
        (variance(v) / len(v) if len(v) > 1 else 0.0, len(v) - 1) for v in (values_a, values_b)
    ]
    squared_error = of_images + sum(part for part, _ in of_seeds)
    degrees = satterthwaite([*of_seeds, (of_images, n_images - 1)])
    half = student_quantile(degrees) * squared_error**0.5
    if len(hits_a) == len(hits_b) == 1:
        shares = _mean_over_seeds(hits_a, terms, "shares") - _mean_over_seeds(
            hits_b,
            terms,
            "shares",
        )
        p_value = sign_flip_p_value(shares)
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


def was_split_seen(training: Mapping[str, Any], data: str, split: str | None) -> bool:
    """Return whether a run trained, or chose its epoch, on this split of the table with the digest
    `data`."""
    splits = training.get("splits") or {}
    return training.get("data") == data and split in (
        splits.get("train") or "train",
        splits.get("dev"),
    )


def _mean_over_seeds(runs: Sequence[RetrievalHits], terms: Sequence[Term], measure: str) -> Any:
    return np.mean([getattr(hits, measure)(terms) for hits in runs], axis=0)


def _chance(report: RetrievalReport, terms: Sequence[Term]) -> float:
    return fmean(getattr(report, f"chance_{way}")[k] for way, k in terms)


def _as_paths(runs: Path | Sequence[Path]) -> list[Path]:
    paths = [runs] if isinstance(runs, Path) else list(runs)
    if not paths:
        raise OptionError(
            "a side of the comparison has no run; give one run or several seeds for each side"
        )
    return paths


def _require_seeds_of_one_recipe(
    paths: Sequence[Path],
    trainings: Mapping[Path, Mapping[str, Any]],
) -> None:
    """Refuse a group whose runs differ in more than their seed: their spread would not be that over
    seeds."""
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
        for what in ("recipe", "encoders"):
            if _recorded(paths[0], trainings, what) != _recorded(path, trainings, what):
                raise OptionError(
                    f"{paths[0]} and {path} are on one side, but their {what} differ; "
                    "put seeds of one recipe on a side, and the other recipe on the other side"
                )


def _recorded(path: Path, trainings: Mapping[Path, Mapping[str, Any]], what: str) -> Any:
    if what == "encoders":
        return [
            recorded_fingerprint(path, "image").digest,
            recorded_fingerprint(path, "text").digest,
        ]
    return trainings[path].get(what)


def _require_same_data(trainings: Mapping[Path, Mapping[str, Any]]) -> None:
    """Refuse runs of different tables or splits. A combination records neither, so it passes."""
    known = {path: training for path, training in trainings.items() if training.get("data")}
    if not known:
        return
    first, *others = known
    for path in others:
        for field, words in (("data", "tables"), ("splits", "splits")):
            here = known[path].get(field)
            there = known[first].get(field)
            if here != there:
                raise MismatchError(
                    f"{first} and {path} were trained on different {words}, so a difference is "
                    "not that of the "
                    "recipes; fit both on one store with the same split options",
                    [(field, here, there)],
                )


def _require_same_queries(embedded: Embeddings, reference: Embeddings, path: Path) -> None:
    same_images = np.array_equal(embedded.image_rows, reference.image_rows)
    same_texts = np.array_equal(embedded.text_rows, reference.text_rows)
    if not (same_images and same_texts):
        raise MismatchError(
            f"{path} can embed {len(embedded.image_rows)} images and {len(embedded.text_rows)} "
            "captions of the split, "
            f"the first run {len(reference.image_rows)} and {len(reference.text_rows)}, or other "
            "ones; "
            "a paired comparison needs the same: repair the store with apecache repair"
        )
