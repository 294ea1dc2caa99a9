"""Train within the towers: what a recipe unlocks trains, and a frozen side is read from the cache.

A side whose tower is frozen is read as the store's pooled features, and its encoder is never
opened. A side whose features are the tokens of a layer (`tokens@8`) runs from there, any other side
from pixels or token ids. Epochs are chosen on the dev split only. An interrupted fit resumes at its
last checkpoint, with the same result bit by bit on the same machine. Under torchrun all processes
train one model (`apecache.train.ranks`).
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.device import resolve_device
from apecache.fingerprint import Json, Modality
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.runs.checkpoint import CHECKPOINT, find_checkpoint
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, save_encoders
from apecache.runs.folder import locked, require_usable
from apecache.runs.ledger import Ledger, ResourceMeter, save_ledger
from apecache.runs.model_card import save_encoder_card
from apecache.storage.replace import remove_tensors
from apecache.store.reader import FeatureStore
from apecache.train.batches import n_items
from apecache.train.compiled import require_compiler
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_setup import PreparedFit, require_sensible, set_up
from apecache.train.fit import StepCount, seeded
from apecache.train.lint.checks import lint_encoder_data
from apecache.train.lint.findings import Finding, require_sound
from apecache.train.lint.model_checks import lint_groups
from apecache.train.live import OpenImage, reading
from apecache.train.loop import FitProgress
from apecache.train.ranks import Ranks, joined, own_device
from apecache.train.session import (
    RunFolder,
    best_and_untrained,
    build_ledger,
    run_in_folder,
    used_values,
)
from apecache.train.tower_fit import EncoderFit

FILES = (WEIGHTS, DESCRIPTION)


@dataclass(frozen=True, kw_only=True)
class FitEncoderReport:
    """Report a finished fit within the towers."""

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
    cached: tuple[Modality, ...]
    """Sides whose encoder was not opened."""
    n_negatives: int
    """Wrong candidates of each query in a batch, as in `Ledger`."""
    resumed_step: int
    """Steps that were done before this call."""
    seconds: float
    """Time of training, with evaluation."""
    ledger: Ledger
    """Costs of the fit."""
    rank: int = 0
    """Number of this process, if torchrun started several."""


def fit_encoder(
    store: FeatureStore,
    recipe: Recipe | AnyPath,
    out: AnyPath,
    spec: FitEncoderSpec | None = None,
    open_image: OpenImage | None = None,
    progress: FitProgress = lambda _: None,
) -> FitEncoderReport:
    """Train the recipe's towers and heads on a store's pairs and write a run folder.

    The same call resumes an interrupted fit. Under torchrun every process makes this call with the
    same arguments. Only the first process writes and reports progress.

    Args:
        store: Store of the pairs.
        recipe: A Recipe, or the name of one.
        out: Run folder.
        spec: Settings of the fit.
        open_image: Reads the image of a key. Needed if the image side runs from pixels.
        progress: Called with every line of the history.

    Raises:
        RunError: `out` holds a finished run, another process fits into it, or `init_from` is not a
            run of fit-head.
        MismatchError: `out` holds another interrupted fit, or the heads to begin with are of other
            encoders or shapes.
        IncompleteError, DamagedError: The store is incomplete or damaged.
        EncoderError: An encoder cannot be loaded, or `compile` is set on a machine that cannot
            compile.
        RecipeError: The rules, splits or widths do not work.
        OptionError: The settings contradict each other.
        DataError: An image is unreadable, a loss is not finite, or a check of `apecache lint`
            fails.
    """
    require_type(store, FeatureStore, "store")
    require_spec(spec, FitEncoderSpec, "spec", optional=True)
    recipe = as_recipe(recipe)
    out = as_path(out, "out")
    spec = spec or FitEncoderSpec()
    device = resolve_device(own_device(spec.device))
    if spec.autocast == "auto":
        # Decided before the fit is identified: a checkpoint names the type that it was made with.
        spec = replace(spec, autocast="bfloat16" if spec.uses_bfloat16(device) else "float32")
    with joined(device) as ranks:
        require_sensible(recipe, spec, ranks)
        require_usable(out, spec.overwrite, FILES)
        if spec.compile:
            require_compiler(device)
        return _fit(
            store,
            recipe=recipe,
            out=out,
            spec=spec,
            open_image=open_image,
            progress=progress,
            device=device,
            ranks=ranks,
        )


def _fit(
    store: FeatureStore,
    recipe: Recipe,
    out: Path,
    spec: FitEncoderSpec,
    open_image: OpenImage | None,
    progress: FitProgress,
    device: torch.device,
    ranks: Ranks,
) -> FitEncoderReport:
    """Run one process of a fit."""
    # The meter starts before the encoders are opened: their memory counts for the peak.
    meter = ResourceMeter(device)
    begin = time.perf_counter()
    setup = set_up(store, recipe=recipe, spec=spec, open_image=open_image, device=device)
    train = setup.train
    dev = setup.dev
    # The recipe of the setup is complete: it may take its temperature from the encoders.
    recipe = setup.opened.recipe
    identity = setup.opened.identity()
    checkpoint = None if spec.overwrite else find_checkpoint(out, identity)
    training = EncoderFit(setup.model, inputs=setup.inputs, recipe=recipe, spec=spec, ranks=ranks)
    plan = StepCount.of(recipe, train)
    findings = _lint(setup, training)
    folder = RunFolder(
        out=out,
        identity=identity,
        save_seconds=spec.save_seconds,
        progress=progress,
        writes=ranks.first,
    )
    loading_seconds = time.perf_counter() - begin
    ranks.wait()  # All processes have read the folder before the first one writes to it.
    own_folder = locked(out) if ranks.first else nullcontext()
    inputs = (*training.inputs, *training.seen)
    with own_folder, seeded(spec.seed + 1, device), reading(inputs):
        resumed_step = run_in_folder(
            training,
            train=train,
            dev=dev,
            plan=plan,
            folder=folder,
            found=checkpoint,
            loading_seconds=loading_seconds,
        )
        arrays = setup.opened.arrays
        costs = build_ledger(
            training,
            train=train,
            plan=plan,
            arrays=arrays,
            meter=meter,
            price_per_hour=spec.price_per_hour,
            resumed_step=resumed_step,
            n_processes=ranks.size,
        )
        report = _report(
            training,
            setup=setup,
            out=out,
            plan=plan,
            resumed_step=resumed_step,
            ledger=replace(costs, warnings=tuple(map(str, findings))),
        )
        if ranks.first:
            _write(
                setup, report, used_values(training, plan, n_items(train, recipe.schedule.epoch))
            )
        ranks.wait()
    return report


def _lint(setup: PreparedFit, training: EncoderFit) -> list[Finding]:
    """Run the checks that need no training step. Raises DataError if one of them fails."""
    opened = setup.opened
    data_findings = lint_encoder_data(
        opened.store,
        recipe=opened.recipe,
        splits=opened.spec.splits,
        report_split=opened.spec.report_split,
        train=setup.train,
    )
    findings = [*data_findings, *lint_groups(setup.model, training.optimizer, opened.recipe)]
    require_sound(findings)
    return findings


# --- what is written down -------------------------------------------------------------------------


def _write(setup: PreparedFit, report: FitEncoderReport, used: dict[str, Json]) -> None:
    """Write ledger, card, weights and description, and remove the checkpoint."""
    out = report.run
    opened = setup.opened
    description = _describe(setup, report, used)
    save_ledger(report.ledger, out)
    save_encoder_card(
        description,
        recipe=opened.recipe,
        dev=report.dev,
        ledger=report.ledger,
        origin=str(opened.store.source["origin"]),
        run=out,
    )
    # The description makes the run a finished one, so ledger and card are written before it and
    # the checkpoint is removed after it.
    save_encoders(out, setup.model.final_state(), description)
    remove_tensors(out / CHECKPOINT)


def _report(
    training: EncoderFit,
    setup: PreparedFit,
    out: Path,
    plan: StepCount,
    resumed_step: int,
    ledger: Ledger,
) -> FitEncoderReport:
    """Load the best weights into the model and report on them."""
    dev_report, untrained = best_and_untrained(training, setup.dev)
    return FitEncoderReport(
        run=out,
        best_epoch=training.best.epoch,
        n_epochs=plan.n_epochs,
        dev=dev_report,
        untrained=untrained,
        n_trained_parameters=training.model.n_trained,
        n_train_images=len(setup.train),
        n_dev_images=len(setup.dev),
        cached=tuple(source.side for source in setup.opened.sources if source.encoder is None),
        n_negatives=ledger.n_negatives,
        resumed_step=resumed_step,
        seconds=training.seconds,
        ledger=ledger,
        rank=training.ranks.rank,
    )


def _describe(
    setup: PreparedFit,
    report: FitEncoderReport,
    used: dict[str, Json],
) -> dict[str, Json]:
    """Return the description of the finished run, as JSON."""
    trained = {
        "image": _n_trainable(setup.model.image),
        "text": _n_trainable(setup.model.text),
    }
    return {
        **setup.opened.describe(trained),
        "used": {
            **used,
            "slice_size": setup.opened.spec.slice_size,
            "compile": setup.opened.spec.compile,
        },
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "n_negatives": report.n_negatives,
        "seconds": report.seconds,
    }


def _n_trainable(module: nn.Module) -> int:
    """Count the parameters that train."""
    parameters = module.parameters()
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
