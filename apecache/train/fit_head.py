"""The head trainer: features stay on the device, the encoders are never opened.

Epochs and the settings of closed forms are chosen on the dev split only (mean of R@1, 5, 10 both ways); the split that
will be reported is never read. A fit that was broken off goes on where its last checkpoint is, and on the CPU ends with
the same weights, bit by bit.
"""

import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_path, require_type
from apecache.durable import remove_tensors
from apecache.errors import RecipeError
from apecache.evaluate.retrieval import RetrievalReport
from apecache.fingerprint import Fingerprint, Json
from apecache.heads.checkpoint import TrainedHeads, TrainedSide, save_heads
from apecache.heads.head import Head, HeadSpec
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.store.array import FeatureArray
from apecache.store.equal import equal_images
from apecache.store.reader import FeatureStore
from apecache.train.batches import (
    FeaturePairs,
    SplitSpec,
    choose_splits,
    load_on,
    require_images,
    select_pairs,
)
from apecache.train.checkpoint import CHECKPOINT
from apecache.train.initial import initial_model
from apecache.train.ledger import Ledger, Meter, read_extraction, save_ledger
from apecache.train.lint import lint_fit, require_sound
from apecache.train.loop import Plan, Progress, Training, seeded
from apecache.train.model import AlignmentModel
from apecache.train.model_card import save_card
from apecache.train.run_folder import find_checkpoint, locked, require_usable
from apecache.train.session import (
    RunFolder,
    best_and_untrained,
    build_ledger,
    run_in_folder,
    used_values,
    with_extraction,
)


@dataclass(frozen=True)
class FitSpec:
    """Which features, which splits, where. Names of features are needed only if the store has several.

    `report_split` will be reported: a fit that trains or chooses on it is refused (`apecache.train.lint`).
    A checkpoint is written at most every `save_seconds`. For the ledger: `price_per_hour` of this machine in any
    currency, and `extract_report`, what `apecache extract --json` printed. Features, splits and seed are part of what a
    fit is: with another value a fit that was broken off does not go on.
    """

    image_features: str | None = None
    text_features: str | None = None
    splits: SplitSpec = field(default_factory=SplitSpec)
    seed: int = 0
    device: str = "auto"
    overwrite: bool = False
    save_seconds: float = 30.0
    report_split: str = "test"
    price_per_hour: float | None = None
    extract_report: AnyPath | None = None


@dataclass(frozen=True)
class FitReport:
    """`dev` and `untrained` are reports on the dev split: of the best epoch, and of the head before training.

    `n_negatives`: wrong candidates of each query in a batch, see `Ledger`; accumulation adds none. `resumed_step`:
    steps that were done before this call.
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
    """Fit the recipe's heads on a store's features and write a run folder: head, history, recipe. The same call again
    goes on with a fit that was broken off. `recipe`: a Recipe, or the name of one.

    Raises:
        RunError: `out` holds a finished run, or another process fits into it. MismatchError: it holds another fit,
        broken off. IncompleteError, DamagedError: the store. RecipeError: the splits or widths do not work. DataError:
        a check of `apecache lint` fails, or a loss is not finite.
    """
    require_type(store, FeatureStore, "store")
    require_type(spec, FitSpec, "spec", optional=True)
    recipe = as_recipe(recipe)
    out = as_path(out, "out")
    spec = spec or FitSpec()
    report_path = as_path(spec.extract_report, "extract_report") if spec.extract_report else None
    if not recipe.trains_heads_alone:
        raise RecipeError(f"recipe {recipe.name} trains within the towers, or freezes a head; use fit-encoder")
    require_usable(out, spec.overwrite)
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    identity = _identity(recipe, spec, store, arrays)
    found = None if spec.overwrite else find_checkpoint(out, identity)
    extraction = read_extraction(report_path, arrays) if report_path else None
    device = choose_device(spec.device)
    meter, begin = Meter(device), time.perf_counter()
    train, dev = load_splits(store, *arrays, spec.splits, device, recipe)
    loading_seconds = time.perf_counter() - begin
    model, chosen = initial_model(recipe, train, dev, spec.seed)
    training, plan = Training(model, recipe, spec.seed), Plan.of(recipe, train)
    if plan.n_steps and training.optimiser is None:
        raise RecipeError(f"recipe {recipe.name}: nothing would be trained; let a head or the temperature learn")
    findings = lint_fit(store, arrays, recipe, spec.splits, spec.report_split, train, model, training.optimiser)
    require_sound(findings)
    folder = RunFolder(out, identity, spec.save_seconds, progress)
    with locked(out), seeded(spec.seed + 1, device):
        resumed_step = run_in_folder(training, train, dev, plan, folder, found, loading_seconds)
        ledger = build_ledger(training, train, plan, arrays, meter, spec.price_per_hour, resumed_step)
        ledger = replace(
            with_extraction(ledger, extraction, recipe.loss.captions), warnings=tuple(str(found) for found in findings)
        )
        report = _report(training, train, dev, out, plan, resumed_step, ledger)
        save_ledger(ledger, out)
        used = used_values(training, plan, len(train))
        heads = _trained(training.model, arrays, recipe, spec, store, report, chosen, used)
        save_card(heads, recipe, report.dev, ledger, str(store.source["origin"]), out)
        save_heads(heads, out)
        remove_tensors(out / CHECKPOINT)
    return report


def load_splits(
    store: FeatureStore,
    image: FeatureArray,
    text: FeatureArray,
    spec: SplitSpec,
    device: torch.device,
    recipe: Recipe | None = None,
) -> tuple[FeaturePairs, FeaturePairs]:
    """Training and dev pairs, on the device where they fit. Raises as `fit_head` does."""
    for array, head in ((image, recipe.image), (text, recipe.text)) if recipe else ():
        require_kind(array, head, recipe.name if recipe else "")
    pairs = store.pairs
    masks = choose_splits(pairs, spec)
    features = load_on(image, device), load_on(text, device)
    ok_images, ok_texts = image.load_ok(), text.load_ok()
    content = equal_images(image)
    equal = content, pairs.caption_ids
    found = [select_pairs(*features, pairs.image_rows, mask & ok_images, ok_texts, *equal) for mask in masks]
    require_images(found[0], found[1])
    views = image.views is not None, text.views is not None
    train, dev = (replace(x, image_views=views[0], text_views=views[1], device=device) for x in found)
    return train, dev


def require_kind(array: FeatureArray, head: HeadSpec, recipe: str) -> None:
    """Raises RecipeError for a head of pooled features on tokens, and for what no head takes."""
    side = array.record.modality
    if array.tokens is not None and (head.cut == "pooled" or array.views is not None):
        what = "views of tokens" if array.views is not None else "tokens"
        raise RecipeError(
            f"recipe {recipe}: {side}.kind {head.kind} takes one vector for each {side}, but {array.name} holds {what};"
            f" choose other features with --{side}-features"
        )


def untrained_heads(store: FeatureStore, recipe: Recipe, spec: FitSpec | None = None) -> TrainedHeads:
    """The recipe's heads as they are before training, standardisation fitted: the baseline of a result table."""
    spec = spec or FitSpec()
    arrays = (store.array("image", spec.image_features), store.array("text", spec.text_features))
    train, dev = load_splits(store, *arrays, spec.splits, choose_device(spec.device), recipe)
    model, _ = initial_model(recipe, train, dev, spec.seed)
    sides = (_side(model.image, arrays[0]), _side(model.text, arrays[1]))
    return TrainedHeads(*sides, float(model.temperature.scale().detach()))


def _identity(
    recipe: Recipe, spec: FitSpec, store: FeatureStore, arrays: tuple[FeatureArray, FeatureArray]
) -> Fingerprint:
    """What a checkpoint belongs to."""
    image, text = (array.record.encoder.digest for array in arrays)
    data = {"data": store.digest, "image_features": image, "text_features": text, "splits": asdict(spec.splits)}
    return Fingerprint({"recipe": recipe.model_dump(mode="json"), "seed": spec.seed, **data})


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
        out,
        training.best.epoch,
        plan.n_epochs,
        found,
        untrained,
        sum(p.numel() for p in training.model.parameters() if p.requires_grad) if plan.n_steps else 0,
        len(train),
        len(dev),
        ledger.n_negatives,
        resumed_step,
        training.seconds,
        ledger,
    )


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(1, device=name).device  # with its index, as tensors on it have it
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device {name!r} cannot be used ({str(error).splitlines()[0]}); try auto or cpu") from None


def _side(head: Head, array: FeatureArray) -> TrainedSide:
    return TrainedSide(head, asdict(array.record.spec), array.record.encoder)


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
