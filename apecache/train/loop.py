"""Run the loop of a fit and hold all of its state.

A checkpoint holds that state, so that an interrupted fit resumes as if it had never stopped.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apecache.device import (
    generator_states,
    is_accelerator,
    seeded_generators,
    set_generator_states,
)
from apecache.errors import DataError, RunError
from apecache.fingerprint import Json
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import flatten_optimizer, restore_optimizer
from apecache.runs.folder import history_line
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs, batches, n_batches
from apecache.train.model import AlignmentModel, evaluate_model
from apecache.train.optim import build_optimizer, learning_rate_factor

SCALE = "temperature.log_scale"
"""Name of the temperature's parameter in the state of a model."""
FitProgress = Callable[[dict[str, Any]], None]
"""Take one line of the history after every evaluation; epoch 0 is the model before training."""


@dataclass(frozen=True, kw_only=True)
class StepCount:
    """Count the steps of a fit."""

    n_steps: int
    """Steps of the fit."""
    per_epoch: int
    """Steps of an epoch."""
    accumulate: int
    """Batches of a step."""

    @property
    def n_epochs(self) -> int:
        """Epochs of the fit, the last of which can be incomplete."""
        return -(-self.n_steps // self.per_epoch)

    @staticmethod
    def of(recipe: Recipe, train: FeaturePairs) -> "StepCount":
        """Plan the steps of a recipe on these pairs."""
        # An epoch with fewer batches than `accumulate` is one step.
        count = n_batches(train, recipe.schedule.batch_size)
        accumulate = min(recipe.schedule.accumulate, count)
        per_epoch = count // accumulate
        return StepCount(
            n_steps=recipe.schedule.steps or per_epoch * recipe.schedule.epochs,
            per_epoch=per_epoch,
            accumulate=accumulate,
        )


@dataclass(kw_only=True)
class BestEvaluation:
    """Hold the evaluation that is best on dev so far."""

    epoch: int = 0
    """Epoch of the evaluation."""
    recall: float = -math.inf
    """Mean recall on dev, in percent."""
    stale: int = 0
    """Evaluations since then."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """Copy of the evaluated weights; empty before the first evaluation that counts."""


class Trainable(Protocol):
    """Describe what a fit and its checks need of a model.

    `rates` returns what trains, with factors of the learning rate. `kept_state` returns all that a
    fit can change, the temperature included, by the names of `named_parameters` and buffers.
    """

    @property
    def temperature(self) -> Any: ...
    def rates(self) -> list[tuple[nn.Parameter, float]]: ...
    def kept_state(self) -> dict[str, Tensor]: ...
    def load_kept(self, tensors: Mapping[str, Tensor]) -> None: ...
    def clamp(self) -> None: ...
    def train(self) -> Any: ...
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


Model = TypeVar("Model", bound=Trainable)


class Fit(ABC, Generic[Model]):
    """Hold everything that a fit changes.

    Attributes:
        average: Exponential moving average (EMA) of the weights, if the recipe has one.
        epoch_draws: State of `generator` at the beginning of the present epoch.
        step: Steps done.
        in_epoch: Steps done in the present epoch.
        losses: Losses of these steps, on the device.
        seconds: Time of training and evaluation, without loading.
        saved_step: Step of the last checkpoint.
        step_flops: Operations of one step; None before the first step.
    """

    def __init__(self, model: Model, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.recipe = recipe
        rates = model.rates()
        self.optimizer = (
            build_optimizer(rates, recipe.optimizer) if rates and _has_steps(recipe) else None
        )
        self.device = model.kept_state()[SCALE].device
        self.average = _cloned(model.kept_state()) if recipe.optimizer.ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_draws = self.generator.get_state()
        self.epoch = 0
        self.step = 0
        self.in_epoch = 0
        self.losses: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self.best = BestEvaluation()
        self.seconds = 0.0
        self.saved_step = 0
        self.evaluation_seconds = 0.0
        self.loading_seconds = 0.0
        self.step_flops: int | None = None

    @abstractmethod
    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Measure retrieval on dev with the model's present weights, without dropout."""

    @abstractmethod
    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        """Add the gradients of a batch's loss divided by `accumulate`.

        Returns:
            The divided loss, on the device, detached.
        """

    def join_gradients(self) -> None:
        """Add up gradients over processes, once before the optimizer's step."""

    @property
    def outcome(self) -> dict[str, Tensor]:
        """Weights that are evaluated and kept: the average if there is one."""
        return self.model.kept_state() if self.average is None else self.average

    @contextmanager
    def with_outcome(self) -> Iterator[None]:
        """Put the average, if there is one, in place of the model's weights for a while."""
        if self.average is None:
            yield
            return
        # A copy: loading the average overwrites the weights in place.
        weights = _cloned(self.model.kept_state())
        self.model.load_kept(self.average)
        try:
            yield
        finally:
            self.model.load_kept(weights)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the fit's state, by `group/name`.

        Groups are the weights, their average, the best weights, the optimizer's state, random
        states, and the losses of the present epoch.
        """
        tensor_groups: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.kept_state(),
            "best": self.best.weights,
        }
        if self.average is not None:
            tensor_groups["average"] = self.average
        if self.optimizer is not None:
            tensor_groups["optimizer"] = flatten_optimizer(self.optimizer)
        random_states = {
            "draws": self.generator.get_state(),
            "epoch": self.epoch_draws,
            "cpu": torch.get_rng_state(),
        }
        if is_accelerator(self.device):
            random_states[self.device.type] = generator_states(self.device)[1]
        tensor_groups["random"] = random_states
        tensor_groups["losses"] = {"epoch": torch.stack(self.losses)} if self.losses else {}
        tensors: dict[str, Tensor] = {}
        for group_name, group_tensors in tensor_groups.items():
            for name, tensor in group_tensors.items():
                tensors[f"{group_name}/{name}"] = tensor
        return tensors

    def state(self) -> dict[str, Json]:
        """Return the rest of the fit's state, as JSON."""
        # Before the first evaluation the best recall is minus infinity, which JSON does not have.
        recall = self.best.recall if self.best.weights else None
        return {
            "epoch": self.epoch,
            "step": self.step,
            "in_epoch": self.in_epoch,
            "history": self.history,
            "best": {"epoch": self.best.epoch, "recall": recall, "stale": self.best.stale},
            "seconds": self.seconds,
            "evaluation_seconds": self.evaluation_seconds,
            "loading_seconds": self.loading_seconds,
            "step_flops": self.step_flops,
        }

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> None:
        """Load what `tensors` and `state` returned.

        Raises:
            RunError: The tensors or the state are not those of such a fit.
        """
        # Groups that had no tensor are missing, such as the optimizer's before its first step.
        tensor_groups: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            group_name, _, name = key.partition("/")
            tensor_groups.setdefault(group_name, {})[name] = tensor
        try:
            self.model.load_kept(tensor_groups["model"])
            if self.average is not None:
                for name, tensor in self.average.items():
                    tensor.copy_(tensor_groups["average"][name])
            if self.optimizer is not None:
                restore_optimizer(self.optimizer, tensor_groups.get("optimizer", {}))
            self._restore_random(tensor_groups["random"])
            losses = tensor_groups.get("losses", {}).get("epoch", torch.empty(0))
            self.losses = [loss.to(self.device) for loss in losses.unbind()]
            self.epoch = int(state["epoch"])
            self.step = int(state["step"])
            self.in_epoch = int(state["in_epoch"])
            self.history = list(state["history"])
            self.seconds = float(state["seconds"])
            self.evaluation_seconds = float(state["evaluation_seconds"])
            self.loading_seconds = float(state["loading_seconds"])
            self.step_flops = state["step_flops"]
            best = state["best"]
            best_tensors = tensor_groups.get("best", {})
            weights = {name: tensor.to(self.device) for name, tensor in best_tensors.items()}
            recall = -math.inf if best["recall"] is None else float(best["recall"])
            self.best = BestEvaluation(
                epoch=int(best["epoch"]),
                recall=recall,
                stale=int(best["stale"]),
                weights=weights,
            )
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            why = str(error).splitlines()[0]
            raise RunError(
                f"the checkpoint does not fit its fit ({why}); begin anew with --overwrite"
            ) from None

    def _restore_random(self, states: Mapping[str, Tensor]) -> None:
        """Restore the fit's own generator and torch's."""
        self.generator.set_state(states["draws"])
        self.epoch_draws = states["epoch"]
        of_device = [states[self.device.type]] if is_accelerator(self.device) else []
        set_generator_states([states["cpu"], *of_device], self.device)


class Training(Fit[AlignmentModel]):
    """Fit heads on cached features."""

    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Measure retrieval on dev. See `Fit.evaluate`."""
        return evaluate_model(self.model, dev)

    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        """Add the gradients of an augmented batch. See `Fit.add_gradients`."""
        model = self.model
        augmented = augment(
            batch,
            spec=self.recipe.augmentation,
            image=model.image,
            text=model.text,
        )
        loss: Tensor = model(augmented, self.step) / accumulate
        loss.backward()
        return loss.detach()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, for dropout and noise, and restore them at the end."""
    with seeded_generators(seed, device):
        yield


def run_training(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
    save: Callable[[bool], None],
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

    Raises:
        DataError: A loss is not finite.
    """
    if not training.history:
        evaluate_untrained(training, dev=dev, plan=plan, log=log)
        save(True)
    while not is_done(training, plan):
        train_epoch(training, train=train, dev=dev, plan=plan, log=log, save=save)


def train_epoch(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
    save: Callable[[bool], None],
) -> None:
    """Run one epoch, or what is left of an interrupted one. See `run_training`."""
    begin = time.perf_counter()
    take_steps(training, drawn=draw_epoch(training, train, plan), plan=plan, save=save)
    end_epoch(training, dev=dev, plan=plan, log=log, begin=begin)
    save(False)


def is_done(training: Fit[Any], plan: StepCount) -> bool:
    """Check whether all steps are done, or dev recall has not improved for too long."""
    patience = training.recipe.schedule.patience
    return training.step >= plan.n_steps or bool(patience and training.best.stale >= patience)


def _evaluate(training: Fit[Any], dev: FeaturePairs) -> RetrievalReport:
    """Measure retrieval on dev with the weights that would be kept."""
    begin = time.perf_counter()
    with training.with_outcome():
        report = training.evaluate(dev)
    training.evaluation_seconds += time.perf_counter() - begin
    return report


def evaluate_untrained(
    training: Fit[Any],
    dev: FeaturePairs,
    plan: StepCount,
    log: FitProgress,
) -> None:
    """Write epoch 0 of the history: the model before training."""
    _record(training, report=_evaluate(training, dev), loss=math.nan, seconds=0.0, log=log)
    if not plan.n_steps:
        _keep(training, training.history[-1]["dev"]["mean_recall"])


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
    training.epoch = training.epoch + 1
    training.in_epoch = 0
    training.losses = []
    is_due = training.epoch % training.recipe.schedule.evaluate_every == 0
    if is_due or training.step >= plan.n_steps:
        report = _evaluate(training, dev)
        seconds = time.perf_counter() - begin
        _record(training, report=report, loss=loss, seconds=seconds, log=log)
        _keep(training, report.mean_recall)


def draw_epoch(training: Fit[Any], train: FeaturePairs, plan: StepCount) -> Iterator[Batch]:
    """Draw the batches of an epoch, or those that an interrupted epoch still needs."""
    recipe = training.recipe
    # An interrupted epoch draws the same batches again and skips those that were used.
    if training.in_epoch:
        training.generator.set_state(training.epoch_draws)
    else:
        training.epoch_draws = training.generator.get_state()
    skip = training.in_epoch * plan.accumulate
    return batches(
        train,
        batch_size=recipe.schedule.batch_size,
        generator=training.generator,
        captions=recipe.loss.captions,
        skip=skip,
    )


def take_steps(
    training: Fit[Any],
    drawn: Iterator[Batch],
    plan: StepCount,
    save: Callable[[bool], None] = lambda _: None,
) -> None:
    """Take steps on these batches up to the end of the epoch."""
    training.model.train()
    while training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
        step_batches = islice(drawn, plan.accumulate)
        training.losses.append(_counted_step(training, step_batches, plan))
        training.step = training.step + 1
        training.in_epoch = training.in_epoch + 1
        # The end of an epoch is saved once it is evaluated.
        if training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
            save(False)


def _counted_step(training: Fit[Any], step_batches: Iterator[Batch], plan: StepCount) -> Tensor:
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
    factor = learning_rate_factor(step, plan.n_steps, recipe.schedule)
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


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors, without graphs."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def require_finite(training: Fit[Any]) -> None:
    """Check the losses of the present epoch.

    Raises:
        DataError: A loss is not finite. The message names the first such step.
    """
    if not training.losses:
        return
    losses = torch.stack(training.losses)
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
    return float(torch.stack(training.losses).mean())


def _record(
    training: Fit[Any],
    report: RetrievalReport,
    loss: float,
    seconds: float,
    log: FitProgress,
) -> None:
    """Add an evaluation to the history."""
    lr = 0.0
    if training.optimizer is not None and training.step:
        lr = training.optimizer.param_groups[0]["lr"]
    temperature = 1 / float(training.outcome[SCALE].exp())
    line = history_line(
        training.epoch,
        step=training.step,
        loss=loss,
        lr=lr,
        temperature=temperature,
        dev=report,
        seconds=seconds,
    )
    training.history.append(line)
    log(line)


def _keep(training: Fit[Any], recall: float) -> None:
    """Copy the evaluated weights if they are the best so far."""
    if recall > training.best.recall:
        training.best = BestEvaluation(
            epoch=training.epoch,
            recall=recall,
            stale=0,
            weights=_cloned(training.outcome),
        )
    else:
        training.best.stale += 1


def _has_steps(recipe: Recipe) -> bool:
    """Check whether the recipe trains at all: a closed form alone does not."""
    return recipe.schedule.epochs > 0 or recipe.schedule.steps > 0
