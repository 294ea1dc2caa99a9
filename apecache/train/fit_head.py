"""Train heads on cached features. The encoders are never opened.

Epochs and the settings of closed forms are chosen on the dev split only, by the mean of R@1, 5 and
10 in both directions. The split that will be reported is never read. An interrupted fit resumes at
its last checkpoint. On the CPU it ends with the same weights, bit by bit.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.errors import RecipeError
from apecache.fingerprint import Json
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.runs.checkpoint import CHECKPOINT, find_checkpoint
from apecache.runs.folder import locked, require_usable
from apecache.runs.heads import TrainedHeads, save_heads
from apecache.runs.ledger import Ledger, ResourceMeter, read_extraction, save_ledger
from apecache.runs.model_card import save_card
from apecache.storage.replace import remove_tensors
from apecache.store.reader import FeatureStore
from apecache.train.batches import FeaturePairs, n_items
from apecache.train.fit import HeadFit, StepCount, seeded
from apecache.train.head_data import FitSpec
from apecache.train.head_inputs import HeadInputs, open_inputs
from apecache.train.initial import initial_model
from apecache.train.lint.checks import lint_fit
from apecache.train.lint.findings import Finding, require_sound
from apecache.train.loop import FitProgress
from apecache.train.recorded_steps import recorded_steps
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
    """Report a finished fit of heads."""

    run: Path
    """Run folder."""
    best_epoch: int
    """Epoch with the best recall on dev; its weights are kept."""
    n_epochs: int
    """Epochs of the plan."""
    dev: RetrievalReport
    """Retrieval on the dev split with the best weights."""
    untrained: RetrievalReport
    """Retrieval on the dev split before training."""
    n_trained_parameters: int
    """Number of parameters that trained."""
    n_train_images: int
    """Number of training images."""
    n_dev_images: int
    """Number of dev images."""
    n_negatives: int
    """Wrong candidates of each query in a batch, as in `Ledger`. Accumulation adds none."""
    resumed_step: int
    """Steps that were done before this call."""
    seconds: float
    """Time of training, with evaluation."""
    ledger: Ledger
    """Costs of the fit."""


def fit_head(
    store: FeatureStore,
    recipe: Recipe | AnyPath,
    out: AnyPath,
    spec: FitSpec | None = None,
    progress: FitProgress = lambda _: None,
) -> FitReport:
    """Fit the recipe's heads on a store's features and write a run folder.

    The same call resumes an interrupted fit.

    Args:
        store: Store of the features.
        recipe: A Recipe, or the name of one.
        out: Run folder.
        spec: Settings of the fit.
        progress: Called with every line of the history.

    Raises:
        RunError: `out` holds a finished run, or another process fits into it.
        MismatchError: `out` holds another interrupted fit, or the features are pooled in another
            way than the recipe says.
        StoreError: The store has no such features, or it is incomplete or damaged.
        EncoderError: The recipe begins with an image-text model, and the features are of others.
        RecipeError: The splits or widths do not work.
        DataError: A check of `apecache lint` fails, or a loss is not finite.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, FitSpec, "spec", optional=True)
    recipe = as_recipe(recipe)
    out = as_path(out, "out")
    spec = spec or FitSpec()
    report_path = as_path(spec.extract_report, "extract_report") if spec.extract_report else None
    if not recipe.trains_heads_alone:
        raise RecipeError(
            f"recipe {recipe.name} trains within the towers, or freezes a head; use fit-encoder"
        )
    # Folder, features and checkpoint are checked before anything large is read.
    require_usable(out, spec.overwrite)
    inputs = open_inputs(store, recipe, spec)
    folder = RunFolder(
        out=out,
        identity=inputs.identity(),
        save_seconds=spec.save_seconds,
        progress=progress,
    )
    checkpoint = None if spec.overwrite else find_checkpoint(out, folder.identity)
    extraction = read_extraction(report_path, inputs.arrays) if report_path else None
    # The meter starts before loading: resident features count for the peak of memory.
    meter = ResourceMeter(inputs.device)
    begin = time.perf_counter()
    train, dev = inputs.load()
    loading_seconds = time.perf_counter() - begin
    model, closed_form = initial_model(inputs.recipe, train=train, dev=dev, seed=spec.seed)
    training = HeadFit(model, inputs.recipe, spec.seed)
    plan = StepCount.of(inputs.recipe, train)
    findings = _checked(training, plan=plan, inputs=inputs, train=train)
    # Dropout and noise draw by another seed than the initial weights.
    with locked(out), seeded(spec.seed + 1, inputs.device):
        resumed_step = run_in_folder(
            training,
            train=train,
            dev=dev,
            plan=plan,
            folder=folder,
            found=checkpoint,
            loading_seconds=loading_seconds,
            recorded=recorded_steps(training, train, plan),
        )
        ledger = build_ledger(
            training,
            train=train,
            plan=plan,
            arrays=inputs.arrays,
            meter=meter,
            price_per_hour=spec.price_per_hour,
            resumed_step=resumed_step,
        )
        report = _report(
            training,
            train=train,
            dev=dev,
            out=out,
            plan=plan,
            resumed_step=resumed_step,
            ledger=replace(
                with_extraction(ledger, extraction, inputs.recipe.loss.captions),
                warnings=tuple(str(finding) for finding in findings),
            ),
        )
        used = used_values(training, plan, n_items(train, inputs.recipe.schedule.epoch))
        recorded = {**inputs.settings(), "closed_form": closed_form, "used": used}
        _save(training, inputs=inputs, report=report, recorded=recorded)
    return report


def untrained_heads(
    store: FeatureStore,
    recipe: Recipe,
    spec: FitSpec | None = None,
) -> TrainedHeads:
    """Return the recipe's heads before training: the baseline of a result table.

    Standardization is fitted on the training features.
    """
    spec = spec or FitSpec()
    inputs = open_inputs(store, recipe, spec)
    train, dev = inputs.load()
    model, _ = initial_model(inputs.recipe, train=train, dev=dev, seed=spec.seed)
    return inputs.heads(model)


def _checked(
    training: HeadFit,
    plan: StepCount,
    inputs: HeadInputs,
    train: FeaturePairs,
) -> list[Finding]:
    """Return the warnings of the checks before a fit.

    Raises:
        RecipeError: Nothing would be trained.
        DataError: A check fails.
    """
    if plan.n_steps and training.optimizer is None:
        raise RecipeError(
            f"recipe {inputs.recipe.name}: nothing would be trained; let a head or the temperature "
            "learn"
        )
    findings = lint_fit(
        inputs.store,
        arrays=inputs.arrays,
        recipe=inputs.recipe,
        splits=inputs.spec.splits,
        report_split=inputs.spec.report_split,
        train=train,
        model=training.model,
        optimizer=training.optimizer,
    )
    require_sound(findings)
    return findings


def _report(
    training: HeadFit,
    train: FeaturePairs,
    dev: FeaturePairs,
    out: Path,
    plan: StepCount,
    resumed_step: int,
    ledger: Ledger,
) -> FitReport:
    """Load the best weights into the model and report on them."""
    dev_report, untrained = best_and_untrained(training, dev)
    n_trained_parameters = 0
    if plan.n_steps:
        trained = [p for p in training.model.parameters() if p.requires_grad]
        n_trained_parameters = sum(parameter.numel() for parameter in trained)
    return FitReport(
        run=out,
        best_epoch=training.best.epoch,
        n_epochs=plan.n_epochs,
        dev=dev_report,
        untrained=untrained,
        n_trained_parameters=n_trained_parameters,
        n_train_images=len(train),
        n_dev_images=len(dev),
        n_negatives=ledger.n_negatives,
        resumed_step=resumed_step,
        seconds=training.seconds,
        ledger=ledger,
    )


def _save(
    training: HeadFit,
    inputs: HeadInputs,
    report: FitReport,
    recorded: dict[str, Json],
) -> None:
    """Write the finished run.

    Args:
        training: State of the fit, with the best weights in the model.
        inputs: What the fit read.
        report: Report on the fit.
        recorded: Settings that the run records.
    """
    results: dict[str, Json] = {
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "n_negatives": report.n_negatives,
        "seconds": report.seconds,
    }
    heads = replace(inputs.heads(training.model), training={**recorded, **results})
    # The heads make the run a finished one, so ledger and card are written before them and the
    # checkpoint is removed after them.
    save_ledger(report.ledger, report.run)
    save_card(
        heads,
        recipe=inputs.recipe,
        dev=report.dev,
        ledger=report.ledger,
        origin=str(inputs.store.source["origin"]),
        run=report.run,
    )
    save_heads(heads, report.run)
    remove_tensors(report.run / CHECKPOINT)
