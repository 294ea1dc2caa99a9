"""The head trainer: features stay on the device, the encoders are never opened.

Epochs and the settings of closed forms are chosen on the dev split only (mean of R@1, 5, 10 both
ways); the split that will be reported is never read. A fit that was broken off goes on where its
last checkpoint is, and on the CPU ends with the same weights, bit by bit.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import RecipeError
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.head import Head
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.folder import find_checkpoint, locked, require_usable
from apecache.runs.heads import TrainedHeads, TrainedSide, save_heads
from apecache.runs.ledger import Ledger, Meter, read_extraction, save_ledger
from apecache.runs.model_card import save_card
from apecache.storage.atomic import remove_tensors
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
)
from apecache.train.head_data import FitSpec, load_splits
from apecache.train.initial import initial_model
from apecache.train.lint.checks import lint_fit, require_sound
from apecache.train.loop import Plan, Progress, Training, seeded
from apecache.train.model import AlignmentModel
from apecache.train.session import (
    RunFolder,
    best_and_untrained,
    build_ledger,
    run_in_folder,
    used_values,
    with_extraction,
)


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """`dev` and `untrained` are reports on the dev split: of the best epoch, and of the head before
    training.

    `n_negatives`: wrong candidates of each query in a batch, see `Ledger`; accumulation adds none.
    `resumed_step`: steps that were done before this call.
    """

    run: Path
    best_epoch: int
    n_epochs: int
    dev: RetrievalReport
    untrained: RetrievalReport
    n_trained_parameters: int
    n_train_images: int
    n_dev_images: int
    n_negatives: int
    resumed_step: int
    seconds: float
    ledger: Ledger


def fit_head(
    store: FeatureStore,
    recipe: Recipe | AnyPath,
    out: AnyPath,
    spec: FitSpec | None = None,
    progress: Progress = lambda _: None,
) -> FitReport:
    """Fit the recipe's heads on a store's features and write a run folder: head, history, recipe.
    The same call again goes on with a fit that was broken off. `recipe`: a Recipe, or the name of
    one.

    Raises:
        RunError: `out` holds a finished run, or another process fits into it. MismatchError: it
            holds another fit,
        broken off. IncompleteError, DamagedError: the store. RecipeError: the splits or widths do
            not work. DataError:
        a check of `apecache lint` fails, or a loss is not finite.
    """
    require_type(store, FeatureStore, "store")
    require_type(spec, FitSpec, "spec", optional=True)
    recipe = as_recipe(recipe)
    out = as_path(out, "out")
    spec = spec or FitSpec()
    report_path = as_path(spec.extract_report, "extract_report") if spec.extract_report else None
    if not recipe.trains_heads_alone:
        raise RecipeError(
            f"recipe {recipe.name} trains within the towers, or freezes a head; use fit-encoder"
        )
    require_usable(out, spec.overwrite)
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    identity = _identity(recipe, spec=spec, store=store, arrays=arrays)
    found = None if spec.overwrite else find_checkpoint(out, identity)
    extraction = read_extraction(report_path, arrays) if report_path else None
    device = choose_device(spec.device)
    meter = Meter(device)
    begin = time.perf_counter()
    train, dev = load_splits(store, *arrays, spec.splits, device, recipe)
    loading_seconds = time.perf_counter() - begin
    model, chosen = initial_model(recipe, train=train, dev=dev, seed=spec.seed)
    training = Training(model, recipe, spec.seed)
    plan = Plan.of(recipe, train)
    if plan.n_steps and training.optimiser is None:
        raise RecipeError(
            f"recipe {recipe.name}: nothing would be trained; let a head or the temperature learn"
        )
    findings = lint_fit(
        store,
        arrays=arrays,
        recipe=recipe,
        splits=spec.splits,
        report_split=spec.report_split,
        train=train,
        model=model,
        optimiser=training.optimiser,
    )
    require_sound(findings)
    folder = RunFolder(
        out=out,
        identity=identity,
        save_seconds=spec.save_seconds,
        progress=progress,
    )
    with locked(out), seeded(spec.seed + 1, device):
        resumed_step = run_in_folder(
            training,
            train=train,
            dev=dev,
            plan=plan,
            folder=folder,
            found=found,
            loading_seconds=loading_seconds,
        )
        ledger = build_ledger(
            training,
            train=train,
            plan=plan,
            arrays=arrays,
            meter=meter,
            price_per_hour=spec.price_per_hour,
            resumed_step=resumed_step,
        )
        ledger = replace(
            with_extraction(ledger, extraction, recipe.loss.captions),
            warnings=tuple(str(found) for found in findings),
        )
        report = _report(
            training,
            train=train,
            dev=dev,
            out=out,
            plan=plan,
            resumed_step=resumed_step,
            ledger=ledger,
        )
        save_ledger(ledger, out)
        used = used_values(training, plan, len(train))
        heads = _trained(
            training.model,
            arrays=arrays,
            recipe=recipe,
            spec=spec,
            store=store,
            report=report,
            chosen=chosen,
            used=used,
        )
        save_card(
            heads,
            recipe=recipe,
            dev=report.dev,
            ledger=ledger,
            origin=str(store.source["origin"]),
            run=out,
        )
        save_heads(heads, out)
        remove_tensors(out / CHECKPOINT)
    return report


def untrained_heads(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitSpec | None = None,
) -> TrainedHeads:
    """The recipe's heads as they are before training, standardisation fitted: the baseline of a
    result table."""
    spec = spec or FitSpec()
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    train, dev = load_splits(store, *arrays, spec.splits, choose_device(spec.device), recipe)
    model, _ = initial_model(recipe, train=train, dev=dev, seed=spec.seed)
    sides = (_side(model.image, arrays[0]), _side(model.text, arrays[1]))
    return TrainedHeads(*sides, float(model.temperature.scale().detach()))


def _identity(
    recipe: Recipe,
    spec: FitSpec,
    store: FeatureStore,
    arrays: tuple[FeatureArray, FeatureArray],
) -> Fingerprint:
    """What a checkpoint belongs to."""
    image, text = (array.record.encoder.digest for array in arrays)
    data = {
        "data": store.digest,
        "image_features": image,
        "text_features": text,
        "splits": asdict(spec.splits),
    }
    return Fingerprint(fields={"recipe": recipe.model_dump(mode="json"), "seed": spec.seed, **data})


def _report(
    training: Training,
    train: FeaturePairs,
    dev: FeaturePairs,
    out: Path,
    plan: Plan,
    resumed_step: int,
    ledger: Ledger,
) -> FitReport:
    """Of the best weights, which are put into the model."""
    found, untrained = best_and_untrained(training, dev)
    return FitReport(
        run=out,
        best_epoch=training.best.epoch,
        n_epochs=plan.n_epochs,
        dev=found,
        untrained=untrained,
        n_trained_parameters=sum(p.numel() for p in training.model.parameters() if p.requires_grad)
        if plan.n_steps
        else 0,
        n_train_images=len(train),
        n_dev_images=len(dev),
        n_negatives=ledger.n_negatives,
        resumed_step=resumed_step,
        seconds=training.seconds,
        ledger=ledger,
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device  # with its index, as tensors on it have it
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try auto or cpu"
        ) from None


def _side(head: Head, array: FeatureArray) -> TrainedSide:
    return TrainedSide(
        head=head,
        encoder=asdict(array.record.spec),
        fingerprint=array.record.encoder,
    )


def _trained(
    model: AlignmentModel,
    arrays: tuple[FeatureArray, FeatureArray],
    recipe: Recipe,
    spec: FitSpec,
    store: FeatureStore,
    report: FitReport,
    chosen: Json,
    used: Json,
) -> TrainedHeads:
    training: dict[str, Json] = {
        "recipe": recipe.model_dump(mode="json"),
        "seed": spec.seed,
        "splits": asdict(spec.splits),
        "data": store.digest,
        "closed_form": chosen,
        "used": used,
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "n_negatives": report.n_negatives,
        "seconds": report.seconds,
    }
    sides = (_side(model.image, arrays[0]), _side(model.text, arrays[1]))
    return TrainedHeads(*sides, float(model.temperature.scale().detach()), training)
