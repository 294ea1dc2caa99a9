"""The encoder trainer: what a recipe unlocks within the towers trains, a side that is frozen comes
from the cache.

A side of which nothing but the head can train is read as the store's pooled features, and its
encoder is never opened. A side whose features are the tokens of a layer (`tokens@8`) runs from
there; any other side from pixels or token ids. Epochs are chosen on the dev split only. A fit that
was broken off goes on where its last checkpoint is, to the same result bit by bit on the same
machine. Under torchrun all its processes train one model (`apecache.train.ranks`).
"""

import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_path, require_type
from apecache.encoders.encoder import parse_device
from apecache.fingerprint import Json, Modality
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe, as_recipe
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, save_encoders
from apecache.runs.folder import find_checkpoint, locked, require_usable
from apecache.runs.ledger import Ledger, Meter, save_ledger
from apecache.runs.model_card import save_encoder_card
from apecache.storage.atomic import remove_tensors
from apecache.store.reader import FeatureStore
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_fit import EncoderFit
from apecache.train.encoder_setup import Setup, require_sensible, set_up
from apecache.train.lint.checks import Finding, lint_encoder_data, lint_groups, require_sound
from apecache.train.live import OpenImage
from apecache.train.loop import Plan, Progress, seeded
from apecache.train.ranks import Ranks, joined, own_device
from apecache.train.session import (
    RunFolder,
    best_and_untrained,
    build_ledger,
    run_in_folder,
    used_values,
)

FILES = (WEIGHTS, DESCRIPTION)


@dataclass(frozen=True, kw_only=True)
class FitEncoderReport:
    """`dev` and `untrained`: on the dev split, of the best epoch and of what training began with.
    `cached`: sides whose encoder was not opened. `n_negatives`, `resumed_step`: as of `FitReport`.
    `rank`: number of this process, where torchrun started several."""

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
    recipe: Recipe | AnyPath,
    out: AnyPath,
    spec: FitEncoderSpec | None = None,
    open_image: OpenImage | None = None,
    progress: Progress = lambda _: None,
) -> FitEncoderReport:
    """Train the recipe's towers and heads on a store's pairs and write a run folder. The same call
    again goes on with a fit that was broken off.

    `recipe`: a Recipe, or the name of one. `open_image`: reads the image of a key; needed where the
    image side is live. Under torchrun every process makes this call, with the same arguments; the
    first one writes, and is told of the progress.

    Raises:
        RunError: `out` holds a finished run, another process fits into it, or `init_from` is no run
            of fit-head.
        MismatchError: it holds another fit, broken off, or the heads to begin with are of other
            encoders or shapes.
        IncompleteError, DamagedError: the store. EncoderError: a live encoder. RecipeError: rules,
            splits or widths do
        not work. OptionError: settings that make no sense. DataError: an unreadable image, a loss
            that is not finite, a
        check of `apecache lint` that fails.
    """
    require_type(store, FeatureStore, "store")
    require_type(spec, FitEncoderSpec, "spec", optional=True)
    recipe = as_recipe(recipe)
    out = as_path(out, "out")
    spec = spec or FitEncoderSpec()
    device = parse_device(own_device(spec.device))
    with joined(device) as ranks:
        require_sensible(recipe, spec, ranks)
        require_usable(out, spec.overwrite, FILES)
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
    progress: Progress,
    device: torch.device,
    ranks: Ranks,
) -> FitEncoderReport:
    meter = Meter(device)
    begin = time.perf_counter()
    setup = set_up(store, recipe=recipe, spec=spec, open_image=open_image, device=device)
    train = setup.train
    dev = setup.dev
    identity = setup.opened.identity()
    found = None if spec.overwrite else find_checkpoint(out, identity)
    training = EncoderFit(setup.model, inputs=setup.inputs, recipe=recipe, spec=spec, ranks=ranks)
    plan = Plan.of(recipe, train)
    findings = _lint(setup, training)
    folder = RunFolder(
        out=out,
        identity=identity,
        save_seconds=spec.save_seconds,
        progress=progress,
        writes=ranks.first,
    )
    loading_seconds = time.perf_counter() - begin
    ranks.wait()  # all have read the folder before the first one writes to it
    with locked(out) if ranks.first else nullcontext(), seeded(spec.seed + 1, device):
        resumed_step = run_in_folder(
            training,
            train=train,
            dev=dev,
            plan=plan,
            folder=folder,
            found=found,
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
            _write(setup, report, used_values(training, plan, len(train)))
        ranks.wait()
    return report


def _lint(setup: Setup, training: EncoderFit) -> list[Finding]:
    """What of `apecache lint` needs no step. Raises DataError for an error among it."""
    opened = setup.opened
    data = lint_encoder_data(
        opened.store,
        recipe=opened.recipe,
        splits=opened.spec.splits,
        report_split=opened.spec.report_split,
        train=setup.train,
    )
    found = [*data, *lint_groups(setup.model, training.optimiser, opened.recipe)]
    require_sound(found)
    return found


# --- what is written down -------------------------------------------------------------------------


def _write(setup: Setup, report: FitEncoderReport, used: dict[str, Json]) -> None:
    out = report.run
    opened = setup.opened
    about = _describe(setup, report, used)
    save_ledger(report.ledger, out)
    save_encoder_card(
        about,
        recipe=opened.recipe,
        dev=report.dev,
        ledger=report.ledger,
        origin=str(opened.store.source["origin"]),
        run=out,
    )
    save_encoders(out, setup.model.final_state(), about)
    remove_tensors(out / CHECKPOINT)


def _report(
    training: EncoderFit,
    setup: Setup,
    out: Path,
    plan: Plan,
    resumed_step: int,
    ledger: Ledger,
) -> FitEncoderReport:
    """Of the best weights, which are put into the model."""
    found, untrained = best_and_untrained(training, setup.dev)
    return FitEncoderReport(
        run=out,
        best_epoch=training.best.epoch,
        n_epochs=plan.n_epochs,
        dev=found,
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


def _describe(setup: Setup, report: FitEncoderReport, used: dict[str, Json]) -> dict[str, Json]:
    model = setup.model
    sides = {"image": model.image, "text": model.text}
    trained = {
        name: sum(p.numel() for p in side.parameters() if p.requires_grad)
        for name, side in sides.items()
    }
    return {
        **setup.opened.describe(trained),
        "used": {**used, "slice_size": setup.opened.spec.slice_size},
        "best_epoch": report.best_epoch,
        "dev": asdict(report.dev),
        "n_trained_parameters": report.n_trained_parameters,
        "n_train_images": report.n_train_images,
        "n_dev_images": report.n_dev_images,
        "n_negatives": report.n_negatives,
        "seconds": report.seconds,
    }
