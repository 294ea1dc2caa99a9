"""Predict what more pairs would bring, and measure what else would help.

Heads are fitted on nested subsets of the training images: a learning curve, which a power law
continues. Beside it stand the measured gains of a second encoder and of more captions.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.auto.fold_fit import fit_in_memory, select_images
from apecache.auto.power_law import Prediction, predict
from apecache.device import resolve_device
from apecache.errors import OptionError, RecipeError, RunError, counted
from apecache.evaluate.embeddings import find_features
from apecache.fingerprint import Json
from apecache.metrics.statistics import estimate_from_recalls
from apecache.recipes.recipe import Recipe, load_recipe, parse_recipe
from apecache.runs.heads import load_heads
from apecache.runs.load import require_head_run
from apecache.storage.replace import replace_text
from apecache.store.joined import BETWEEN_NAMES
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs, SplitSpec
from apecache.train.head_data import load_splits, require_kind
from apecache.train.model import evaluate_model

FORECAST = "forecast.json"
LEAST_IMAGES = 40
"""Images of the smallest subset, at least."""
LEAST_BATCH = 32
MULTIPLES = (2, 5, 10)
"""Multiples of the training images that are predicted."""


@dataclass(frozen=True, kw_only=True)
class ForecastSpec:
    """Say what is measured, and how."""

    recipe: str = "projection"
    """Recipe of the heads, if no run is given."""
    run: AnyPath | None = None
    """Run of fit-head, whose recipe, features and splits are used."""
    image_features: str | None = None
    """Name of the image features; needed without a run if the store has several."""
    text_features: str | None = None
    """As `image_features`."""
    splits: SplitSpec | None = None
    """Training and dev split; None: those of the run, or the usual ones."""
    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the training images that are fitted."""
    seeds: int = 3
    """Fits of each share, each with another subset."""
    seed: int = 0
    """Seed of the first subset and fit."""
    device: str = "auto"
    """Device of the fits."""


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """Report the fits on one number of images."""

    n_images: int
    recalls: tuple[float, ...]
    """Mean R@1 of both directions on dev for each seed, in per cent."""


@dataclass(frozen=True, kw_only=True)
class Gain:
    """Report what a change brings on dev with all training images."""

    change: str
    recall: float
    """Mean R@1 with the change, over seeds, in per cent."""
    baseline: float
    """Mean R@1 without it."""
    low: float
    """Lower end of the 95 % interval of `recall`."""
    high: float


@dataclass(frozen=True, kw_only=True)
class ForecastReport:
    """Report a learning curve and its continuation."""

    recipe: str
    n_train_images: int
    n_dev_images: int
    curve: tuple[CurvePoint, ...]
    predictions: tuple[Prediction, ...]
    gains: tuple[Gain, ...]
    """Measured gains of other changes."""
    chance: float
    """Mean R@1 of a random order on dev."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as JSON."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class ForecastInputs:
    """Hold what is fitted and measured on."""

    store: FeatureStore
    recipe: Recipe
    image_name: str
    text_name: str
    splits: SplitSpec


ForecastProgress = Callable[[str, float], None]
"""Take what was fitted, and its mean R@1 on dev in per cent."""


def forecast(
    store: FeatureStore,
    out: AnyPath,
    spec: ForecastSpec | None = None,
    progress: ForecastProgress = lambda *_: None,
) -> ForecastReport:
    """Measure a learning curve, predict its continuation, and write `forecast.json`.

    Args:
        store: A complete feature store.
        out: Folder to write to.
        spec: What is measured, and how.
        progress: Called after each fit.

    Raises:
        OptionError: The shares or seeds make no curve.
        RunError: The run is not one of fit-head.
        RecipeError: There are too few images, or the recipe does not suit the features.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, ForecastSpec, "spec", optional=True)
    spec = spec or ForecastSpec()
    out = as_path(out, "out")
    _require_curve(spec)
    inputs = _open(store, spec)
    train, dev = _load(inputs, inputs.image_name, spec)
    curve = _curve(inputs.recipe, train=train, dev=dev, spec=spec, progress=progress)
    n_train = len(train)
    report = ForecastReport(
        recipe=inputs.recipe.name,
        n_train_images=n_train,
        n_dev_images=len(dev),
        curve=tuple(curve),
        predictions=tuple(
            predict(
                {point.n_images: point.recalls for point in curve},
                [multiple * n_train for multiple in MULTIPLES],
            )
        ),
        gains=tuple(
            _gains(
                inputs,
                curve=curve,
                train=train,
                dev=dev,
                spec=spec,
                progress=progress,
            )
        ),
        chance=100 / len(dev),
    )
    out.mkdir(parents=True, exist_ok=True)
    replace_text(out / FORECAST, json.dumps(report.to_json(), indent=1, ensure_ascii=False))
    return report


def _require_curve(spec: ForecastSpec) -> None:
    shares = set(spec.shares)
    if len(shares) < 3 or not all(0 < share <= 1 for share in shares):
        raise OptionError("shares: expected at least 3 different ones above 0, at most 1")
    if spec.seeds < 1:
        raise OptionError(f"seeds: expected at least 1, found {spec.seeds}")


def _open(store: FeatureStore, spec: ForecastSpec) -> ForecastInputs:
    """Choose recipe, features and splits: those of the run, or of the settings."""
    if spec.run is None:
        recipe = load_recipe(spec.recipe)
        image = store.array("image", spec.image_features)
        text = store.array("text", spec.text_features)
        splits = spec.splits or SplitSpec()
    else:
        run = as_path(spec.run, "run")
        require_head_run(run, "forecast")
        heads = load_heads(run)
        if "recipe" not in heads.training:
            raise RunError(f"{run} is a combination of runs; give one of the runs it is made of")
        recipe = parse_recipe(heads.training["recipe"], str(run))
        image = find_features(heads.image, store, "image")
        text = find_features(heads.text, store, "text")
        splits = spec.splits or SplitSpec(**heads.training["splits"])
    if not recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains within the towers; give one of heads")
    require_kind(image, recipe.image, recipe.name)
    require_kind(text, recipe.text, recipe.name)
    return ForecastInputs(
        store=store,
        recipe=recipe,
        image_name=image.name,
        text_name=text.name,
        splits=splits,
    )


def _load(
    inputs: ForecastInputs,
    image_name: str,
    spec: ForecastSpec,
) -> tuple[FeaturePairs, FeaturePairs]:
    return load_splits(
        inputs.store,
        image=inputs.store.array("image", image_name),
        text=inputs.store.array("text", inputs.text_name),
        spec=inputs.splits,
        device=resolve_device(spec.device),
    )


def _curve(
    recipe: Recipe,
    train: FeaturePairs,
    dev: FeaturePairs,
    spec: ForecastSpec,
    progress: ForecastProgress,
) -> list[CurvePoint]:
    """Fit nested subsets: a larger share of one seed holds all images of the smaller ones."""
    subset_sizes = sorted({round(share * len(train)) for share in spec.shares})
    if subset_sizes[0] < LEAST_IMAGES:
        raise RecipeError(
            f"the smallest subset has {counted(subset_sizes[0], 'image')}; at least "
            f"{LEAST_IMAGES} are needed: give larger --shares"
        )
    points: list[CurvePoint] = []
    for size in subset_sizes:
        recalls: list[float] = []
        for seed in range(spec.seed, spec.seed + spec.seeds):
            images = subset(len(train), size, seed)
            recall = measured_recall(
                scaled_recipe(recipe, size / len(train)),
                train=select_images(train, images),
                dev=dev,
                seed=seed,
            )
            recalls.append(recall)
            progress(counted(size, "image"), recall)
        points.append(CurvePoint(n_images=size, recalls=tuple(recalls)))
    return points


def subset(n_images: int, size: int, seed: int) -> NDArray[np.int64]:
    """Draw images; with one seed smaller subsets are parts of larger ones."""
    order = np.random.default_rng(seed).permutation(n_images)
    return np.sort(order[:size])


def scaled_recipe(recipe: Recipe, share: float) -> Recipe:
    """Return the recipe for a share of the images: with as many steps in an epoch as for all.

    With the same batch, small subsets would get too few steps, and the curve would be too steep.
    """
    batch_size = max(LEAST_BATCH, round(recipe.schedule.batch_size * share))
    schedule = recipe.schedule.model_copy(update={"batch_size": batch_size})
    return recipe.model_copy(update={"schedule": schedule})


def measured_recall(recipe: Recipe, train: FeaturePairs, dev: FeaturePairs, seed: int) -> float:
    """Fit heads, and return their mean R@1 on dev, in per cent."""
    fit = fit_in_memory(recipe, train=train, dev=dev, seed=seed)
    return evaluate_model(fit.model, dev).mean_recall_at_1


def _gains(
    inputs: ForecastInputs,
    curve: list[CurvePoint],
    train: FeaturePairs,
    dev: FeaturePairs,
    spec: ForecastSpec,
    progress: ForecastProgress,
) -> list[Gain]:
    """Measure other changes with all training images."""
    everything = np.arange(len(train))
    complete_points = [point for point in curve if point.n_images == len(train)]
    seeds = range(spec.seed, spec.seed + spec.seeds)
    if complete_points:
        baseline = fmean(complete_points[0].recalls)
    else:
        recalls = [measured_recall(inputs.recipe, train, dev, seed) for seed in seeds]
        baseline = fmean(recalls)
    variants: dict[str, tuple[FeaturePairs, FeaturePairs]] = {}
    most_captions = int(train.first_text.diff().max())
    if most_captions > 1:
        variants["only 1 caption of each image"] = (select_images(train, everything, 1), dev)
    for array in inputs.store.arrays("image"):
        is_used = array.name in inputs.image_name.split(BETWEEN_NAMES)
        if is_used or array.tokens is not None or array.views is not None or not array.complete:
            continue
        joined_name = f"{inputs.image_name}{BETWEEN_NAMES}{array.name}"
        variants[f"image features {array.name} beside"] = _load(inputs, joined_name, spec)
    gains: list[Gain] = []
    for change, (varied_train, varied_dev) in variants.items():
        recalls = [measured_recall(inputs.recipe, varied_train, varied_dev, seed) for seed in seeds]
        estimate = estimate_from_recalls(recalls, len(varied_dev))
        progress(change, estimate.value)
        gain = Gain(
            change=change,
            recall=estimate.value,
            baseline=baseline,
            low=estimate.low,
            high=estimate.high,
        )
        gains.append(gain)
    return gains
