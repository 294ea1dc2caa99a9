"""A fit in its run folder, of either trainer: it begins or goes on, writes history and checkpoints,
adds up costs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from apecache.fingerprint import Fingerprint, Json
from apecache.metrics.retrieval import RetrievalReport
from apecache.runs.checkpoint import save_checkpoint
from apecache.runs.folder import add_to_history, clear_folder, write_history
from apecache.runs.ledger import Extraction, Ledger, Meter, money, runs_until_paid, stored_bytes
from apecache.store.array import FeatureArray
from apecache.train.batches import FeaturePairs
from apecache.train.lint.checks import n_negatives
from apecache.train.loop import SCALE, Fit, Plan, Progress, require_finite, run_training

WAYS = ("image_to_text", "text_to_image")
SAVE_SHARE = 0.05
"""Share of the time that writing checkpoints may take."""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """`identity`: what a checkpoint belongs to. `progress` is told every line of the history.
    `writes` False: another process writes this folder, and this one only reads the checkpoint."""

    out: Path
    identity: Fingerprint
    save_seconds: float
    progress: Progress
    writes: bool = True


def run_in_folder(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: Plan,
    folder: RunFolder,
    found: tuple[dict[str, Any], dict[str, Any]] | None,
    loading_seconds: float,
) -> int:
    """The whole training, or what is left of it after the checkpoint `found`; returns the steps
    done before.

    Raises:
        RunError: the checkpoint does not fit. DataError: a loss is not finite.
    """
    if found is not None:
        training.restore(*found)
    if folder.writes:
        if found is None:
            clear_folder(folder.out, training.recipe)
        else:
            write_history(folder.out, training.history)
    training.loading_seconds += loading_seconds
    resumed_step = training.step
    run_training(
        training,
        train=train,
        dev=dev,
        plan=plan,
        log=_logger(folder),
        save=_saver(training, folder),
    )
    return resumed_step


def _logger(folder: RunFolder) -> Progress:
    def log(line: dict[str, Json]) -> None:
        if folder.writes:
            add_to_history(folder.out, line)
            folder.progress(line)

    return log


def _saver(training: Fit[Any], folder: RunFolder) -> Callable[[bool], None]:
    """Writes a checkpoint when it is time, or when told to; keeps the count of seconds."""
    begin = time.perf_counter()
    before = training.seconds
    every = folder.save_seconds
    due = [begin + every]

    def save(now: bool) -> None:
        clock = time.perf_counter()
        training.seconds = before + clock - begin
        if folder.writes and (now or clock >= due[0]):
            require_finite(training)
            state = {"identity": dict(folder.identity.fields), **training.state()}
            save_checkpoint(folder.out, training.tensors(), state)
            training.saved_step = training.step
            took = time.perf_counter() - clock
            due[0] = time.perf_counter() + max(every, took / SAVE_SHARE if every else 0)

    return save


def best_and_untrained(
    training: Fit[Any],
    dev: FeaturePairs,
) -> tuple[RetrievalReport, RetrievalReport]:
    """Reports on dev of the best weights, which are put into the model, and of what training began
    with."""
    training.model.load_kept(training.best.weights)
    found = training.evaluate(dev)
    first = training.history[0]["dev"]
    to_text, to_image = ({int(k): float(v) for k, v in first[way].items()} for way in WAYS)
    return found, replace(found, image_to_text=to_text, text_to_image=to_image)


def used_values(training: Fit[Any], plan: Plan, n_train: int) -> dict[str, Json]:
    """Collect what a finished fit really used, where the recipe only says what was asked for.

    Call it with the best weights in the model. `n_epochs` and `n_steps` are those that ran
    (patience can stop earlier than `planned_epochs`). `temperature` divides the cosines of the kept
    model; `first_temperature` is that of epoch 0, of a warm start or of the recipe.
    """
    schedule = training.recipe.schedule
    used: dict[str, Json] = {
        "n_epochs": training.epoch,
        "planned_epochs": plan.n_epochs,
        "n_steps": training.step,
        "first_temperature": training.history[0]["temperature"],
        "temperature": 1 / float(training.model.kept_state()[SCALE].exp()),
    }
    if plan.n_steps:
        used |= {"batch_size": min(schedule.batch_size, n_train), "accumulate": plan.accumulate}
    return used


def build_ledger(
    training: Fit[Any],
    train: FeaturePairs,
    plan: Plan,
    arrays: Sequence[FeatureArray],
    meter: Meter,
    price_per_hour: float | None,
    resumed_step: int,
    n_processes: int = 1,
) -> Ledger:
    """`arrays`: what was read of the store. With several processes operations and money are those
    of all of them, memory and energy those of this one."""
    schedule = training.recipe.schedule
    loss = training.recipe.loss
    size = min(schedule.batch_size, len(train))
    step_flops = (training.step_flops or 0) * n_processes
    loading = training.loading_seconds
    evaluation = training.evaluation_seconds
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
        energy_joules=None if resumed_step else meter.joules(),
        money=money((loading + training.seconds) * n_processes, price_per_hour),
    )


def with_extraction(ledger: Ledger, extraction: Extraction | None, captions: int = 1) -> Ledger:
    """With what the extraction took, and after how many such fits it has paid for itself."""
    if extraction is None:
        return ledger
    n_images = ledger.n_samples // captions
    paid = runs_until_paid(
        extraction,
        n_images=n_images,
        n_samples=ledger.n_samples,
        loading_seconds=ledger.loading_seconds,
    )
    return replace(ledger, extraction_seconds=extraction.seconds, runs_until_paid=paid)
