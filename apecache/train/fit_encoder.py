"""The encoder trainer: what a recipe unlocks within the towers trains, a side that is frozen comes from the cache.

A side of which nothing but the head can train is read as the store's pooled features, and its encoder is never opened.
A side whose features are the tokens of a layer (`tokens@8`) runs from there; any other side from pixels or token ids.
Epochs are chosen on the dev split only. A fit that was broken off goes on where its last checkpoint is, to the same
result bit by bit on the same machine. Under torchrun all its processes train one model (`apecache.train.ranks`).
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apecache.encoders.encoder import parse_device
from apecache.errors import OptionError, RecipeError
from apecache.evaluate.retrieval import RetrievalReport
from apecache.fingerprint import Fingerprint, Json, Modality
from apecache.recipes.encoder_model import EncoderModel, Side, Teacher, build_model
from apecache.recipes.recipe import Recipe
from apecache.recipes.trained_encoders import DESCRIPTION, WEIGHTS, save_encoders
from apecache.store.reader import FeatureArray, FeatureStore
from apecache.train.batches import FeaturePairs
from apecache.train.checkpoint import CHECKPOINT
from apecache.train.encoder_data import (
    FitEncoderSpec,
    Source,
    TeacherSource,
    open_inputs,
    open_source,
    open_teacher,
    split_rows,
)
from apecache.train.encoder_fit import EncoderFit, image_views
from apecache.train.ledger import Ledger, Meter, save_ledger
from apecache.train.lint import Finding, lint_recipe, lint_splits, require_sound
from apecache.train.live import Inputs, OpenImage
from apecache.train.loop import Plan, Progress, seeded
from apecache.train.ranks import Ranks, joined, own_device
from apecache.train.run_folder import find_checkpoint, locked, require_usable
from apecache.train.session import RunFolder, best_and_untrained, build_ledger, run_in_folder

FILES = (WEIGHTS, DESCRIPTION)


@dataclass(frozen=True)
class FitEncoderReport:
    """`dev` and `untrained`: on the dev split, of the best epoch and of what training began with. `cached`: sides whose
    encoder was not opened. `n_negatives`, `resumed_step`: as of `FitReport`. `rank`: number of this process, where
    torchrun started several."""

    run: Path
    best_epoch: int
    n_epochs: int
    dev: RetrievalReport
    untrained: RetrievalReport
    n_trained_parameters: int
    n_train_images: int
    n_dev_images: int
    cached: tuple[Modality, ...]
    n_negatives: int
    resumed_step: int
    seconds: float
    ledger: Ledger
    rank: int = 0


def fit_encoder(
    store: FeatureStore,
    recipe: Recipe,
    out: Path,
    spec: FitEncoderSpec | None = None,
    open_image: OpenImage | None = None,
    progress: Progress = lambda _: None,
) -> FitEncoderReport:
    """Train the recipe's towers and heads on a store's pairs and write a run folder. The same call again goes on with a
    fit that was broken off.

    `open_image`: reads the image of a key; needed where the image side is live. Under torchrun every process makes this
    call, with the same arguments; the first one writes, and is told of the progress.

    Raises:
        RunError: `out` holds a finished run, or another process fits into it. MismatchError: it holds another fit,
        broken off. IncompleteError, DamagedError: the store. EncoderError: a live encoder. RecipeError: rules, splits
        or widths do not work. OptionError: settings that make no sense. DataError: an unreadable image, a loss that is
        not finite, a check of `apecache lint` that fails.
    """
    spec = spec or FitEncoderSpec()
    device = parse_device(own_device(spec.device))
    with joined(device) as ranks:
        _require_sensible(recipe, spec, ranks)
        require_usable(out, spec.overwrite, FILES)
        return _fit(store, recipe, out, spec, open_image, progress, device, ranks)


def _fit(
    store: FeatureStore,
    recipe: Recipe,
    out: Path,
    spec: FitEncoderSpec,
    open_image: OpenImage | None,
    progress: Progress,
    device: torch.device,
    ranks: Ranks,
) -> FitEncoderReport:
    meter, begin = Meter(device), time.perf_counter()
    sources = [open_source(store, recipe, side, spec, device) for side in ("image", "text")]
    teacher = open_teacher(store, recipe, device)
    train, dev = split_rows(store, sources, spec, teacher)
    model, inputs = _build(store, recipe, spec, sources, train, open_image, device, teacher)
    identity = _identity(store, recipe, spec, sources, teacher)
    found = None if spec.overwrite else find_checkpoint(out, identity)
    training, plan = EncoderFit(model, inputs, recipe, spec, ranks), Plan.of(recipe, train)
    findings = _lint(store, recipe, spec, len(train))
    folder = RunFolder(out, identity, spec.save_seconds, progress, ranks.first)
    loading_seconds = time.perf_counter() - begin
    ranks.wait()  # all have read the folder before the first one writes to it
    with locked(out) if ranks.first else nullcontext(), seeded(spec.seed + 1, device):
        resumed_step = run_in_folder(training, train, dev, plan, folder, found, loading_seconds)
        arrays = _arrays(sources, teacher)
        costs = build_ledger(
            training, len(train), plan, arrays, meter, spec.price_per_hour, resumed_step, n_processes=ranks.size
        )
        ledger = replace(costs, warnings=tuple(map(str, findings)))
        report = _report(training, (train, dev), out, plan, sources, resumed_step, ledger)
        if ranks.first:
            save_ledger(ledger, out)
            save_encoders(out, model.final_state(), _describe(recipe, spec, sources, store, report, teacher))
            (out / CHECKPOINT).unlink(missing_ok=True)
        ranks.wait()
    return report


# --- what is trained -------------------------------------------------------------------------------------------------


def _require_sensible(recipe: Recipe, spec: FitEncoderSpec, ranks: Ranks) -> None:
    if spec.slice_size is not None and spec.slice_size < 1:
        raise OptionError(f"slices of {spec.slice_size} pairs; expected at least 1")
    if recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains heads alone; use fit-head, which is faster")
    _require_known(recipe)
    sliced = spec.slice_size is not None and spec.slice_size < recipe.schedule.batch_size
    if (sliced or ranks.size > 1) and "batch" in (recipe.image.norm, recipe.text.norm):
        raise RecipeError(f"recipe {recipe.name}: batch norm needs the whole batch at once; leave slices out")


ONLY: dict[str, tuple[object, str]] = {
    "init": ("random", "a closed form needs the features of both sides"),
    "augmentation.noise": (0.0, "noise is for cached features; see augmentation.image"),
    "augmentation.mixup": (0.0, "mixup is for cached features"),
    "augmentation.token_dropout": (0.0, "it is for heads on cached tokens"),
}
"""What a recipe may say of these here, and why nothing else."""


def _require_known(recipe: Recipe) -> None:
    """Refuse what this trainer would pass over in silence."""
    values = recipe.model_dump()
    for path, (only, why) in ONLY.items():
        found: Any = values
        for key in path.split("."):
            found = found[key]
        if found != only:
            raise RecipeError(f"recipe {recipe.name}: {path} is {found}; fit-encoder takes {only} only: {why}")
    if recipe.shared is not None and recipe.loss.structure:
        raise RecipeError(f"recipe {recipe.name}: loss.structure compares heads, which a shared encoder has not")
    if not (recipe.schedule.epochs or recipe.schedule.steps) or "tokens" in recipe.cut:
        what = "heads on pooled outputs" if "tokens" in recipe.cut else "at least one epoch"
        raise RecipeError(f"recipe {recipe.name}: fit-encoder needs {what}")


def _build(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitEncoderSpec,
    sources: Sequence[Source],
    train: FeaturePairs,
    open_image: OpenImage | None,
    device: torch.device,
    teacher: TeacherSource | None,
) -> tuple[EncoderModel, tuple[Inputs, Inputs]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        encoders, cuts = [source.encoder for source in sources], [source.cut for source in sources]
        taught = None if teacher is None else Teacher(teacher.taught.shape[1], teacher.taught)
        model = build_model(recipe, encoders, [source.dim for source in sources], device, cuts, taught)
    for side, source, used in zip((model.image, model.text), sources, (train.image, train.text), strict=True):
        if isinstance(side, Side) and side.tower is None and source.features is not None:
            side.head.fit_statistics(source.features[used.to(device)])
    image, text = (open_inputs(source, store, open_image, device) for source in sources)
    image_views(recipe, spec, (image, text))
    return model, (image, text)


def _arrays(sources: Sequence[Source], teacher: TeacherSource | None) -> list[FeatureArray]:
    """What is read of the store."""
    sides = [source.array for source in sources if source.array is not None]
    return sides if teacher is None else [*sides, teacher.array]


def _lint(store: FeatureStore, recipe: Recipe, spec: FitEncoderSpec, n_train: int) -> list[Finding]:
    """What of `apecache lint` does not need the features of both sides. Raises DataError for an error among it."""
    found = list(lint_recipe(recipe, n_train))
    images, texts = store.arrays("image"), store.arrays("text")
    if images and texts:
        found += lint_splits(store, (images[0], texts[0]), spec.splits, spec.report_split)
    require_sound(found)
    return found


# --- what is written down --------------------------------------------------------------------------------------------


def _identity(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitEncoderSpec,
    sources: Sequence[Source],
    teacher: TeacherSource | None,
) -> Fingerprint:
    """What a checkpoint belongs to."""
    sides: dict[str, Json] = {s.side: {"encoder": dict(s.fingerprint.fields), "cut": s.cut} for s in sources}
    taught: Json = None if teacher is None else dict(teacher.fingerprint.fields)
    return Fingerprint({**_settings(store, recipe, spec), **sides, "teacher": taught})


def _settings(store: FeatureStore, recipe: Recipe, spec: FitEncoderSpec) -> dict[str, Json]:
    return {
        "recipe": recipe.model_dump(mode="json"),
        "seed": spec.seed,
        "splits": asdict(spec.splits),
        "autocast": spec.autocast,
        "data": store.digest,
    }


def _report(
    training: EncoderFit,
    splits: tuple[FeaturePairs, FeaturePairs],
    out: Path,
    plan: Plan,
    sources: Sequence[Source],
    resumed_step: int,
    ledger: Ledger,
) -> FitEncoderReport:
    """Of the best weights, which are put into the model."""
    train, dev = splits
    found, untrained = best_and_untrained(training, dev)
    return FitEncoderReport(
        out,
        training.best.epoch,
        plan.n_epochs,
        found,
        untrained,
        training.model.n_trained,
        len(train),
        len(dev),
        tuple(source.side for source in sources if source.encoder is None),
        ledger.n_negatives,
        resumed_step,
        training.seconds,
        ledger,
        training.ranks.rank,
    )


def _describe(
    recipe: Recipe,
    spec: FitEncoderSpec,
    sources: Sequence[Source],
    store: FeatureStore,
    report: FitEncoderReport,
    teacher: TeacherSource | None,
) -> dict[str, Json]:
    sides: dict[str, Json] = {
        source.side: {
            "encoder": asdict(source.encoder_spec),
            "fingerprint": source.fingerprint.fields,
            "dim": source.dim,
            "cached": source.encoder is None,
            "cut": source.cut,
        }
        for source in sources
    }
    taught: Json = None if teacher is None else {"name": teacher.array.name, "dim": teacher.taught.shape[1]}
    return {
        **sides,
        "teacher": taught,
        **_settings(store, recipe, spec),
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "n_negatives": report.n_negatives,
        "seconds": report.seconds,
    }
