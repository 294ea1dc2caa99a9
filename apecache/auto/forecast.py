"""Predict what more pairs would bring, and measure what else would help.

Heads are fitted on nested subsets of the training images: a learning curve, which a power law
continues. Beside it stand the measured gains of a second encoder, of more captions, and of a text
tower that trains.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.auto.fit_features import features_of_recipe, features_of_run
from apecache.auto.fold_fit import fit_in_memory, select_images
from apecache.auto.power_law import Prediction, predict
from apecache.auto.tower_trial import Announce, TowerTrial, try_tower
from apecache.device import resolve_device
from apecache.errors import ApecacheError, OptionError, RecipeError, counted
from apecache.evaluate.comparison import METRICS, compare_hits
from apecache.fingerprint import Json
from apecache.metrics.statistics import estimate_from_recalls, estimate_recall
from apecache.recipes.recipe import Recipe
from apecache.storage.replace import replace_text
from apecache.store.joined import BETWEEN_NAMES
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs, SplitSpec
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.head_data import load_splits, require_kind
from apecache.train.model import AlignmentModel, evaluate_model
from apecache.train.pooling import has_asked_pooling

FORECAST = "forecast.json"
LEAST_IMAGES = 40
"""Images of the smallest subset, at least."""
LEAST_BATCH = 32
MULTIPLES = (2, 5, 10)
"""Multiples of the training images that are predicted."""
METRIC = "mean R@1"
"""Metric of the paired comparison, a name in `apecache.evaluate.comparison.METRICS`."""


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
    tower_seconds: float | None = None
    """Most time of the training steps of a text tower, whose gain is measured; None: no tower
    trains. A trial that would take longer is shortened."""
    tower_epochs: int = 1
    """Epochs of that trial, each of all captions."""


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
    paired_low: float | None = None
    """Lower end of the 95 % interval of `recall` less `baseline`, paired over the same dev images;
    None: not paired."""
    paired_high: float | None = None
    note: str = ""
    """What was measured, and what it cost."""


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
    no_tower: str = ""
    """Why no text tower was tried; empty if one was, or none was asked for."""

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
    announce: Announce = lambda _: None,
) -> ForecastReport:
    """Measure a learning curve, predict its continuation, and write `forecast.json`.

    Args:
        store: A complete feature store.
        out: Folder to write to.
        spec: What is measured, and how.
        progress: Called after each fit.
        announce: Called with the cost of the trial of a text tower, before it begins.

    Raises:
        OptionError: The shares or seeds make no curve, or the trial of a text tower has no time.
        RunError: The run is not one of fit-head.
        RecipeError: There are too few images, or the recipe does not suit the features.
        MismatchError: The features are pooled in another way than the recipe says.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, ForecastSpec, "spec", optional=True)
    spec = spec or ForecastSpec()
    out = as_path(out, "out")
    _require_curve(spec)
    inputs = _open(store, spec)
    train, dev = _load(inputs, inputs.image_name, spec)
    curve, heads = _curve(inputs.recipe, train=train, dev=dev, spec=spec, progress=progress)
    n_train = len(train)
    gains = _gains(
        inputs,
        curve=curve,
        train=train,
        dev=dev,
        spec=spec,
        progress=progress,
    )
    no_tower = ""
    if spec.tower_seconds is not None:
        # The shares may leave out the fit on all images.
        if heads is None:
            heads = fit_in_memory(inputs.recipe, train=train, dev=dev, seed=spec.seed).model
        try:
            gain = _tower_gain(
                inputs,
                heads=heads,
                spec=spec,
                limit_seconds=spec.tower_seconds,
                announce=announce,
            )
            gains.append(gain)
            progress(gain.change, gain.recall)
        except ApecacheError as error:
            # The rest of the forecast does not need the tower.
            no_tower = str(error)
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
        gains=tuple(gains),
        chance=100 / len(dev),
        no_tower=no_tower,
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
    if spec.tower_epochs < 1:
        raise OptionError(f"tower_epochs: expected at least 1, found {spec.tower_epochs}")
    if spec.tower_seconds is not None and not 0 < spec.tower_seconds < math.inf:
        raise OptionError(f"tower_seconds: expected some above 0, found {spec.tower_seconds}")


def _open(store: FeatureStore, spec: ForecastSpec) -> ForecastInputs:
    """Choose recipe, features and splits: those of the run, or of the settings."""
    if spec.run is None:
        opened = features_of_recipe(
            store,
            recipe_name=spec.recipe,
            image_features=spec.image_features,
            text_features=spec.text_features,
        )
    else:
        opened = features_of_run(store, spec.run, "forecast")
    recipe = opened.recipe
    require_kind(opened.image, recipe.image, recipe.name)
    require_kind(opened.text, recipe.text, recipe.name)
    return ForecastInputs(
        store=store,
        recipe=recipe,
        image_name=opened.image.name,
        text_name=opened.text.name,
        splits=spec.splits or opened.splits or SplitSpec(),
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
) -> tuple[list[CurvePoint], AlignmentModel | None]:
    """Fit nested subsets: a larger share of one seed holds all images of the smaller ones.

    Returns:
        The curve, and the heads of the first seed on all images; None if no share is all.
    """
    subset_sizes = sorted({round(share * len(train)) for share in spec.shares})
    if subset_sizes[0] < LEAST_IMAGES:
        raise RecipeError(
            f"the smallest subset has {counted(subset_sizes[0], 'image')}; at least "
            f"{LEAST_IMAGES} are needed: give larger --shares"
        )
    points: list[CurvePoint] = []
    complete: AlignmentModel | None = None
    for size in subset_sizes:
        recalls: list[float] = []
        for seed in range(spec.seed, spec.seed + spec.seeds):
            images = subset(len(train), size, seed)
            fit = fit_in_memory(
                scaled_recipe(recipe, size / len(train)),
                train=select_images(train, images),
                dev=dev,
                seed=seed,
            )
            recall = evaluate_model(fit.model, dev).mean_recall_at_1
            if size == len(train) and seed == spec.seed:
                complete = fit.model
            recalls.append(recall)
            progress(counted(size, "image"), recall)
        points.append(CurvePoint(n_images=size, recalls=tuple(recalls)))
    return points, complete


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
        # A fit would refuse them.
        if not has_asked_pooling(array, inputs.recipe):
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


def _tower_gain(
    inputs: ForecastInputs,
    heads: AlignmentModel,
    spec: ForecastSpec,
    limit_seconds: float,
    announce: Announce,
) -> Gain:
    """Measure a text tower that trains, from the heads of the first seed.

    Raises:
        ApecacheError: The text tower cannot be tried.
    """
    trial = try_tower(
        inputs.store,
        model=heads,
        recipe=inputs.recipe,
        spec=FitEncoderSpec(
            image_features=inputs.image_name,
            text_features=inputs.text_name,
            splits=inputs.splits,
            seed=spec.seed,
            device=spec.device,
        ),
        n_epochs=spec.tower_epochs,
        limit_seconds=limit_seconds,
        announce=announce,
    )
    paired = compare_hits([trial.after], [trial.before], metric=METRIC, chance=0.0)
    estimate = estimate_recall([trial.after], METRICS[METRIC])
    return Gain(
        change=f"text tower trained, last {counted(trial.n_blocks, 'block')}",
        recall=paired.value_a,
        baseline=paired.value_b,
        low=estimate.low,
        high=estimate.high,
        paired_low=paired.low,
        paired_high=paired.high,
        note=_note(trial),
    )


def _note(trial: TowerTrial) -> str:
    """Say what a trial brought by the steadier mean of all recalls, and what it cost."""
    whole = compare_hits([trial.after], [trial.before], metric="mean of all", chance=0.0)
    return (
        f"text tower: mean of R@1, 5 and 10 {whole.difference:+.1f} ({whole.low:+.1f} to "
        f"{whole.high:+.1f}); {counted(trial.n_steps, 'step')} of {trial.n_epoch_steps:,} in an "
        f"epoch, {trial.seconds:.0f} s in all; a short trial, which can show less than "
        "fit-encoder brings"
    )
