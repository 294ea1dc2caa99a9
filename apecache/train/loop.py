"""Run the loop of a fit: epochs, steps and evaluations.

The state is that of `apecache.train.fit`. `apecache.train.best_epoch` chooses what is kept and when
to stop early.
"""

import math
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apecache.device import float32_products
from apecache.errors import DataError
from apecache.losses.contrastive import temperature_in
from apecache.metrics.retrieval import RetrievalReport
from apecache.runs.folder import history_line
from apecache.train.batches import Batch, FeaturePairs, batches
from apecache.train.fit import Fit, StepCount, Trainable, cloned_tensors
from apecache.train.optim import learning_rate_factor

FitProgress = Callable[[dict[str, Any]], None]
"""Take one line of the history after every evaluation; epoch 0 is the model before training."""


class EpochSteps(Protocol):
    """Take the rest of an epoch's steps in another way than `take_steps`, with equal effect."""

    def take_steps(self, save: Callable[[bool], None]) -> None: ...


def run_training(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
    save: Callable[[bool], None],
    recorded: EpochSteps | None = None,
) -> None:
    """Run a fit from its present state to the end. Then `training.best` holds what to keep.

    The model before training is evaluated, but is kept only if nothing trains.

    Args:
        training: State of the fit.
        train: Training pairs.
        dev: Dev pairs.
        plan: Steps of the fit.
        log: Called with every line of the history.
        save: Called after every step with False, when it may write a checkpoint, and with True
            when it must.
        recorded: Takes the steps of an epoch in place of `take_steps`.

    Raises:
        DataError: A loss is not finite.
    """
    if not training.history:
        evaluate_untrained(training, dev=dev, plan=plan, log=log)
        save(True)
    while not is_done(training, plan):
        train_epoch(
            training,
            train=train,
            dev=dev,
            plan=plan,
            log=log,
            save=save,
            recorded=recorded,
        )


def train_epoch(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
    save: Callable[[bool], None],
    recorded: EpochSteps | None = None,
) -> None:
    """Run one epoch, or what is left of an interrupted one. See `run_training`."""
    begin = time.perf_counter()
    if recorded is None:
        take_steps(training, drawn=draw_epoch(training, train, plan), plan=plan, save=save)
    else:
        recorded.take_steps(save)
    end_epoch(training, dev=dev, plan=plan, log=log, begin=begin)
    save(False)


def is_done(training: Fit[Any], plan: StepCount) -> bool:
    """Check whether all steps are done, or dev recall has not improved for too long."""
    patience = training.recipe.schedule.patience
    return training.step >= plan.n_steps or training.best.stops_early(patience)


def _evaluate(training: Fit[Any], dev: FeaturePairs) -> RetrievalReport:
    """Measure retrieval on dev with the weights that would be kept."""
    begin = time.perf_counter()
    with training.with_outcome(), float32_products(training.device, tf32=False):
        try:
            report = training.evaluate(dev)
        except DataError as error:
            if not training.step or "not finite" not in str(error):
                raise
            raise DataError(
                f"training diverged: at step {training.step} the embeddings are not finite; lower "
                "optimizer.lr or set optimizer.clip, and add --overwrite"
            ) from None
    training.evaluation_seconds += time.perf_counter() - begin
    return report


def evaluate_untrained(
    training: Fit[Any],
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
) -> None:
    """Write epoch 0 of the history: the model before training."""
    report = _evaluate(training, dev)
    _record(training, report=report, loss=math.nan, seconds=0.0, log=log)
    if not plan.n_steps:
        keep_if_best(training, report.selection_score)


def end_epoch(
    training: Fit[Any],
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
    begin: float,
) -> None:
    """End an epoch, and evaluate if it is time.

    Args:
        training: State of the fit.
        dev: Dev pairs.
        plan: Steps of the fit.
        log: Called with the line of the history.
        begin: Reading of `time.perf_counter` at the beginning of the epoch.

    Raises:
        DataError: A loss is not finite.
    """
    # Once an epoch: looking at every loss would wait for the GPU in every step.
    require_finite(training)
    loss = _mean_loss(training)
    contrastive = training.mean_contrastive()
    training.epoch = training.epoch + 1
    training.in_epoch = 0
    training.forget_losses()
    is_due = training.epoch % training.recipe.schedule.evaluate_every == 0
    if is_due or training.step >= plan.n_steps:
        report = _evaluate(training, dev)
        seconds = time.perf_counter() - begin
        _record(
            training,
            report=report,
            loss=loss,
            contrastive=contrastive,
            seconds=seconds,
            log=log,
        )
        keep_if_best(training, report.selection_score)


def draw_epoch(training: Fit[Any], train: FeaturePairs, plan: StepCount) -> Iterator[Batch]:
    """Draw the batches of an epoch, or those that an interrupted epoch still needs."""
    recipe = training.recipe
    skip = begin_draws(training, plan)
    return batches(
        train,
        batch_size=recipe.schedule.batch_size,
        generator=training.generator,
        captions=recipe.loss.captions,
        skip=skip,
        epoch=recipe.schedule.epoch,
    )


def begin_draws(training: Fit[Any], plan: StepCount) -> int:
    """Prepare the generator for an epoch's batches; return how many of them were used before."""
    # An interrupted epoch draws the same batches again and skips those that were used.
    if training.in_epoch:
        training.generator.set_state(training.epoch_draws)
    else:
        training.epoch_draws = training.generator.get_state()
    return training.in_epoch * plan.accumulate


def take_steps(
    training: Fit[Any],
    drawn: Iterator[Batch],
    plan: StepCount,
    save: Callable[[bool], None] = lambda _: None,
) -> None:
    """Take steps on these batches up to the end of the epoch, on CUDA with products in TF32."""
    training.model.train()
    drawn = training.read_ahead(drawn)
    while training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
        step_batches = islice(drawn, plan.accumulate)
        # Steps alone: evaluations and closed forms keep the products of float32.
        with float32_products(training.device, tf32=True):
            training.add_loss(counted_step(training, step_batches, plan))
        training.step = training.step + 1
        training.in_epoch = training.in_epoch + 1
        # The end of an epoch is saved once it is evaluated.
        if training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
            save(False)


def counted_step(training: Fit[Any], step_batches: Iterator[Batch], plan: StepCount) -> Tensor:
    """Take a step, and count the operations of the first one."""
    if training.step_flops is not None:
        return take_step(training, step_batches, plan)
    # All steps have the same shapes, so the count is that of every step.
    with FlopCounterMode(display=False) as counter:
        loss = take_step(training, step_batches, plan)
    training.step_flops = int(counter.get_total_flops())
    return loss


def take_step(training: Fit[Any], drawn: Iterator[Batch], plan: StepCount) -> Tensor:
    """Take one step of the optimizer. Returns its loss, on the device."""
    assert training.optimizer is not None
    training.optimizer.zero_grad(set_to_none=True)
    # The loss stays on the device: reading it would wait for the GPU in every step.
    total = torch.zeros((), device=training.device)
    for batch in drawn:
        total += training.add_gradients(batch, plan.accumulate)
    training.join_gradients()
    set_rates(training, plan)
    apply_update(training)
    return total


def set_rates(training: Fit[Any], plan: StepCount) -> None:
    """Set the learning rates of the next step."""
    optimizer = training.optimizer
    assert optimizer is not None
    rates = rates_at(training, training.step, plan)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def rates_at(training: Fit[Any], step: int, plan: StepCount) -> list[float]:
    """Return the learning rate of each parameter group at a step."""
    optimizer = training.optimizer
    recipe = training.recipe
    assert optimizer is not None
    factor = learning_rate_factor(
        step,
        n_steps=plan.n_steps,
        spec=recipe.schedule,
        per_epoch=plan.per_epoch,
    )
    return [recipe.optimizer.lr * factor * group["factor"] for group in optimizer.param_groups]


def apply_update(training: Fit[Any], update: Callable[[], object] | None = None) -> None:
    """Update the weights from the present gradients.

    Nothing is read from the device, so that a CUDA graph can record the update if its rates are
    tensors.

    Args:
        training: State of the fit.
        update: Replaces the optimizer's own step.
    """
    model = training.model
    optimizer = training.optimizer
    recipe = training.recipe
    assert optimizer is not None
    if recipe.optimizer.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
    (update or optimizer.step)()
    model.clamp()
    if training.average is not None:
        _follow(training.average, model, recipe.optimizer.ema)


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: Trainable, decay: float) -> None:
    """Move the average toward the weights. Buffers are copied.

    torch's `AveragedModel` and timm's `ModelEmaV3` would copy the whole model, frozen towers
    included, where this keeps the tensors of `kept_state` alone.
    """
    parameter_names = {name for name, _ in model.named_parameters()}
    for name, tensor in model.kept_state().items():
        # Buffers can be integers, which have no average.
        if name in parameter_names:
            average[name].lerp_(tensor, 1 - decay)
        else:
            average[name].copy_(tensor)


def require_finite(training: Fit[Any]) -> None:
    """Check the losses of the present epoch.

    Raises:
        DataError: A loss is not finite. The message names the first such step.
    """
    if not training.losses:
        return
    losses = training.epoch_losses()
    bad_positions = (~torch.isfinite(losses)).nonzero()
    if len(bad_positions):
        first_step = training.step - len(training.losses) + 1
        step = first_step + int(bad_positions[0])
        raise DataError(
            f"the loss is not finite at step {step}; the last good checkpoint is that of step "
            f"{training.saved_step}; lower optimizer.lr, and add --overwrite"
        )


def _mean_loss(training: Fit[Any]) -> float:
    """Return the mean loss of the present epoch."""
    return float(training.epoch_losses().mean())


def _record(
    training: Fit[Any],
    report: RetrievalReport,
    loss: float,
    seconds: float,
    log: FitProgress,
    contrastive: float | None = None,
) -> None:
    """Add an evaluation to the history."""
    lr = 0.0
    if training.optimizer is not None and training.step:
        lr = training.optimizer.param_groups[0]["lr"]
    temperature = temperature_in(training.outcome)
    line = history_line(
        training.epoch,
        step=training.step,
        loss=loss,
        contrastive=contrastive,
        lr=lr,
        temperature=temperature,
        dev=report,
        seconds=seconds,
    )
    training.history.append(line)
    log(line)


def keep_if_best(training: Fit[Any], recall: float) -> None:
    """Copy the evaluated weights if they are the best so far."""
    training.best = training.best.after(
        training.epoch,
        recall=recall,
        copy_weights=lambda: cloned_tensors(training.outcome),
    )
