"""Run a fit of heads (`fit_head`) or of towers (`fit_encoder`) in its run folder.

A fit begins or resumes, writes its history and checkpoints, and adds up its costs.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apecache.fingerprint import Fingerprint, Json
from apecache.losses.contrastive import temperature_in
from apecache.metrics.retrieval import RetrievalReport
from apecache.runs.checkpoint import save_checkpoint
from apecache.runs.folder import add_to_history, clear_folder, write_history
from apecache.runs.ledger import (
    ExtractionSeconds,
    Ledger,
    ResourceMeter,
    money,
    runs_until_paid,
    stored_bytes,
)
from apecache.store.array import FeatureArray
from apecache.train.batches import FeaturePairs, n_items
from apecache.train.fit import Fit, StepCount
from apecache.train.lint.checks import n_negatives
from apecache.train.loop import EpochSteps, FitProgress, require_finite, run_training

logger = logging.getLogger(__name__)

SAVE_SHARE = 0.05
"""Share of the time that may be spent on writing checkpoints."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Say where and how a fit writes."""

    out: Path
    """Run folder."""
    identity: Fingerprint
    """Identity of the fit, which its checkpoints carry."""
    save_seconds: float
    """Least time between two checkpoints."""
    progress: FitProgress
    """Called with every line of the history, in the process that writes."""
    writes: bool = True
    """Whether this process writes; if not, it only reads the checkpoint."""


def run_in_folder(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    folder: RunFolder,
    found: tuple[dict[str, Any], dict[str, Any]] | None,
    loading_seconds: float,
    recorded: EpochSteps | None = None,
) -> int:
    """Run the training, or what is left of it after a checkpoint.

    Args:
        training: State of the fit.
        train: Training pairs.
        dev: Dev pairs.
        plan: Steps of the fit.
        folder: Where the fit writes.
        found: Tensors and state of a checkpoint; None: begin anew.
        loading_seconds: Time that loading took in this call.
        recorded: See `run_training`.

    Returns:
        Steps that were done before.

    Raises:
        RunError: The checkpoint does not fit the model.
        DataError: A loss is not finite.
    """
    if found is not None:
        tensors, state = found
        training.restore(tensors, state)
    if folder.writes:
        if found is None:
            clear_folder(folder.out, training.recipe)
        else:
            # The file can have lines that are newer than the checkpoint.
            write_history(folder.out, training.history)
    # The checkpoint restored the loading time of earlier calls.
    training.loading_seconds += loading_seconds
    resumed_step = training.step
    if folder.writes:
        logger.info(
            "fitting %s in %s: %d images, %d on dev, step %d of %d",
            training.recipe.name,
            folder.out,
            len(train),
            len(dev),
            resumed_step,
            plan.n_steps,
        )
    run_training(
        training,
        train=train,
        dev=dev,
        plan=plan,
        log=_logger(folder),
        save=_saver(training, folder),
        recorded=recorded,
    )
    if folder.writes:
        logger.info(
            "fitted %s in %s: the best epoch is %d of %d, %.1f s",
            training.recipe.name,
            folder.out,
            training.best.epoch,
            plan.n_epochs,
            training.seconds,
        )
    return resumed_step


def _logger(folder: RunFolder) -> FitProgress:
    """Return a function that writes a line of the history and reports it."""

    def log(line: dict[str, Json]) -> None:
        if folder.writes:
            add_to_history(folder.out, line)
            _log_epoch(line)
            folder.progress(line)

    return log


def _log_epoch(line: Mapping[str, Any]) -> None:
    """Log a line of the history. Epoch 0, before training or of a closed form, has no loss."""
    loss = "no step" if line["loss"] is None else f"loss {line['loss']:.4f}"
    recall = line["dev"]["mean_recall"]
    logger.info("epoch %d: %s, mean recall on dev %.1f %%", line["epoch"], loss, recall)


def _saver(training: Fit[Any], folder: RunFolder) -> Callable[[bool], None]:
    """Return a function that writes a checkpoint when it is time, and counts the seconds."""
    begin = time.perf_counter()
    earlier_seconds = training.seconds
    due = begin + folder.save_seconds

    def save(now: bool) -> None:
        nonlocal due
        clock = time.perf_counter()
        training.seconds = earlier_seconds + clock - begin
        if folder.writes and (now or clock >= due):
            # A checkpoint must not keep weights that have become NaN.
            require_finite(training)
            state = {"identity": dict(folder.identity.fields), **training.state()}
            save_checkpoint(folder.out, training.tensors(), state)
            training.saved_step = training.step
            saving_seconds = time.perf_counter() - clock
            # Large checkpoints are written less often; with 0 seconds, after each step.
            pause_seconds = saving_seconds / SAVE_SHARE if folder.save_seconds else 0
            due = time.perf_counter() + max(folder.save_seconds, pause_seconds)

    return save


def best_and_untrained(
    training: Fit[Any],
    dev: FeaturePairs,
) -> tuple[RetrievalReport, RetrievalReport]:
    """Load the best weights and report on dev, with them and before training."""
    training.model.load_kept(training.best.weights)
    best_report = training.evaluate(dev)
    first = training.history[0]["dev"]
    # All but the recalls, such as numbers of rows and chance, does not depend on the weights.
    untrained = replace(
        best_report,
        image_to_text=_recalls(first["image_to_text"]),
        text_to_image=_recalls(first["text_to_image"]),
    )
    return best_report, untrained


def _recalls(recorded: Mapping[str, Json]) -> dict[int, float]:
    """Read recalls by k from a line of the history, where JSON made k a string."""
    return {int(k): float(recall) for k, recall in recorded.items()}


def used_values(training: Fit[Any], plan: StepCount, n_in_epoch: int) -> dict[str, Json]:
    """Collect the settings that a finished fit used, which can differ from the recipe's.

    The best weights must be in the model. `n_epochs` and `n_steps` are those that ran: patience can
    stop earlier than `planned_epochs`. `temperature` divides the cosines of the kept model.
    `first_temperature` is that of epoch 0, from a warm start or from the recipe.
    """
    schedule = training.recipe.schedule
    used: dict[str, Json] = {
        "n_epochs": training.epoch,
        "planned_epochs": plan.n_epochs,
        "n_steps": training.step,
        "first_temperature": training.history[0]["temperature"],
        "temperature": temperature_in(training.model.kept_state()),
    }
    if plan.n_steps:
        used |= {"batch_size": min(schedule.batch_size, n_in_epoch), "accumulate": plan.accumulate}
    return used


def build_ledger(
    training: Fit[Any],
    train: FeaturePairs,
    plan: StepCount,
    arrays: Sequence[FeatureArray],
    meter: ResourceMeter,
    price_per_hour: float | None,
    resumed_step: int,
    n_processes: int = 1,
) -> Ledger:
    """Add up the costs of a finished fit.

    Operations and money are those of all processes, memory and energy those of this one.

    Args:
        training: State of the fit.
        train: Training pairs.
        plan: Steps of the fit.
        arrays: Arrays of the store that were read.
        meter: Readings since the fit began.
        price_per_hour: Price of one process; None: not known.
        resumed_step: Steps that were done before this call.
        n_processes: Processes that trained.
    """
    schedule = training.recipe.schedule
    loss = training.recipe.loss
    size = min(schedule.batch_size, n_items(train, schedule.epoch))
    step_flops = (training.step_flops or 0) * n_processes
    loading = training.loading_seconds
    evaluation = training.evaluation_seconds
    paid_seconds = (loading + training.seconds) * n_processes
    return Ledger(
        training_seconds=training.seconds - evaluation,
        evaluation_seconds=evaluation,
        loading_seconds=loading,
        n_steps=training.step,
        step_flops=step_flops,
        flops=step_flops * training.step,
        n_samples=training.step * plan.accumulate * size * loss.captions,
        n_negatives=n_negatives(training.recipe, len(train), train),
        nominal_batch=size * plan.accumulate if plan.n_steps else 0,
        store_bytes=sum(stored_bytes(array) for array in arrays),
        peak_bytes=meter.peak_bytes(),
        # The meter has not seen the energy of the steps before.
        energy_joules=None if resumed_step else meter.joules(),
        money=money(paid_seconds, price_per_hour),
    )


def with_extraction(
    ledger: Ledger,
    extraction: ExtractionSeconds | None,
    captions: int = 1,
) -> Ledger:
    """Add the time of extraction, and the fits after which it has paid for itself.

    Args:
        ledger: Costs of a fit.
        extraction: Times of extraction; None: the ledger stays as it is.
        captions: Captions of each image in a batch.
    """
    if extraction is None:
        return ledger
    # A sample is a caption with its image.
    n_images = ledger.n_samples // captions
    paid = runs_until_paid(
        extraction,
        n_images=n_images,
        n_samples=ledger.n_samples,
        loading_seconds=ledger.loading_seconds,
    )
    return replace(ledger, extraction_seconds=extraction.seconds, runs_until_paid=paid)
