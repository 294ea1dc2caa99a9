"""The loop of a fit, and all of its state: what a checkpoint holds, so that a fit goes on as if
never broken off."""

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

from apecache.errors import DataError, RunError
from apecache.fingerprint import Json
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import flatten_optimiser, restore_optimiser
from apecache.runs.folder import history_line
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs, batches, n_batches
from apecache.train.model import AlignmentModel, evaluate_model
from apecache.train.optim import build_optimiser, learning_rate_factor

SCALE = "temperature.log_scale"
Progress = Callable[[dict[str, Any]], None]
"""Called with one line of the history after every evaluation; epoch 0 is the untrained head."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Steps of a fit: `accumulate` batches each, `per_epoch` of them in an epoch."""

    n_steps: int
    per_epoch: int
    accumulate: int

    @property
    def n_epochs(self) -> int:
        return -(-self.n_steps // self.per_epoch)

    @staticmethod
    def of(recipe: Recipe, train: FeaturePairs) -> "Plan":
        count = n_batches(train, recipe.schedule.batch_size)
        accumulate = min(recipe.schedule.accumulate, count)
        per_epoch = count // accumulate
        return Plan(
            n_steps=recipe.schedule.steps or per_epoch * recipe.schedule.epochs,
            per_epoch=per_epoch,
            accumulate=accumulate,
        )


@dataclass(kw_only=True)
class Best:
    """The evaluation that is best on dev so far; `stale` ones came after it."""

    epoch: int = 0
    recall: float = -math.inf
    stale: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)


class Trainable(Protocol):
    """What a fit, and its checks, need of a model. `rates`: what trains, with factors of the
    learning rate; `kept_state`: all that a fit can change, by the names of `named_parameters` and
    buffers, the temperature's among them."""

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
    """Everything that a fit changes. `step`: steps done; `in_epoch`: those of the present epoch,
    whose batches were drawn from `epoch_draws`; `saved_step`: that of the last checkpoint;
    `step_flops`: operations of one step, once one was counted; `average`: of the weights, where the
    recipe wants one. `seconds` holds those of evaluation, not those of loading."""

    def __init__(self, model: Model, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.recipe = recipe
        rates = model.rates()
        self.optimiser = (
            build_optimiser(rates, recipe.optimiser) if rates and _has_steps(recipe) else None
        )
        self.device = model.kept_state()[SCALE].device
        self.average = _cloned(model.kept_state()) if recipe.optimiser.ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_draws = self.generator.get_state()
        self.epoch = 0
        self.step = 0
        self.in_epoch = 0
        self.losses: list[Tensor] = []
        self.history: list[dict[str, Any]] = []
        self.best = Best()
        self.seconds = 0.0
        self.saved_step = 0
        self.evaluation_seconds = 0.0
        self.loading_seconds = 0.0
        self.step_flops: int | None = None

    @abstractmethod
    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Retrieval on dev with the weights that the model has, dropout off."""

    @abstractmethod
    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        """Add the gradients of a batch's loss over `accumulate`; returns it, on the device, without
        a graph."""

    def join_gradients(self) -> None:
        """Called once before the optimiser's step: where several processes have a part of the
        gradients each."""

    @property
    def outcome(self) -> dict[str, Tensor]:
        """What is evaluated and kept: the average, or the weights."""
        return self.model.kept_state() if self.average is None else self.average

    @contextmanager
    def with_outcome(self) -> Iterator[None]:
        """The average in the place of the model's weights for a while, where there is one."""
        if self.average is None:
            yield
            return
        own = _cloned(self.model.kept_state())
        self.model.load_kept(self.average)
        try:
            yield
        finally:
            self.model.load_kept(own)

    def tensors(self) -> dict[str, Tensor]:
        """Weights, averages, best weights, the optimiser's state, random states, losses of this
        epoch."""
        parts: dict[str, Mapping[str, Tensor]] = {
            "model": self.model.kept_state(),
            "best": self.best.weights,
        }
        if self.average is not None:
            parts["average"] = self.average
        if self.optimiser is not None:
            parts["optimiser"] = flatten_optimiser(self.optimiser)
        parts["random"] = {
            "draws": self.generator.get_state(),
            "epoch": self.epoch_draws,
            "cpu": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            parts["random"] = {**parts["random"], "cuda": torch.cuda.get_rng_state(self.device)}
        parts["losses"] = {"epoch": torch.stack(self.losses)} if self.losses else {}
        return {
            f"{part}/{name}": tensor
            for part, found in parts.items()
            for name, tensor in found.items()
        }

    def state(self) -> dict[str, Json]:
        recall = self.best.recall if self.best.weights else None
        best = {"epoch": self.best.epoch, "recall": recall, "stale": self.best.stale}
        counts = {"epoch": self.epoch, "step": self.step, "in_epoch": self.in_epoch}
        seconds = {
            "evaluation_seconds": self.evaluation_seconds,
            "loading_seconds": self.loading_seconds,
        }
        costs = {"seconds": self.seconds, **seconds, "step_flops": self.step_flops}
        return {**counts, "history": self.history, "best": best, **costs}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Json]) -> None:
        """Raises RunError unless these are the tensors of such a fit."""
        parts: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        try:
            self.model.load_kept(parts["model"])
            if self.average is not None:
                for name, tensor in self.average.items():
                    tensor.copy_(parts["average"][name])
            if self.optimiser is not None:
                restore_optimiser(self.optimiser, parts.get("optimiser", {}))
            self._restore_random(parts["random"])
            losses = parts.get("losses", {}).get("epoch", torch.empty(0))
            self.losses = [loss.to(self.device) for loss in losses.unbind()]
            self.epoch, self.step, self.in_epoch = (
                int(state[name]) for name in ("epoch", "step", "in_epoch")
            )
            self.history = list(state["history"])
            self.seconds = float(state["seconds"])
            self.evaluation_seconds = float(state["evaluation_seconds"])
            self.loading_seconds = float(state["loading_seconds"])
            self.step_flops = state["step_flops"]
            best = state["best"]
            weights = {n: t.to(self.device) for n, t in parts.get("best", {}).items()}
            recall = -math.inf if best["recall"] is None else float(best["recall"])
            self.best = Best(
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
        self.generator.set_state(states["draws"])
        self.epoch_draws = states["epoch"]
        torch.set_rng_state(states["cpu"])
        if "cuda" in states:
            torch.cuda.set_rng_state(states["cuda"], self.device)


class Training(Fit[AlignmentModel]):
    """A fit of heads on cached features."""

    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        return evaluate_model(self.model, dev)

    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        model = self.model
        drawn = augment(batch, spec=self.recipe.augmentation, image=model.image, text=model.text)
        loss: Tensor = model(drawn, self.step) / accumulate
        loss.backward()
        return loss.detach()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's own generators by seed, for dropout and noise; the program's numbers are left
    alone."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def run_training(
    training: Fit[Any],
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: Plan,
    log: Progress,
    save: Callable[[bool], None],
) -> None:
    """From wherever `training` stands to the end. Afterwards `training.best` holds what is to be
    kept.

    `save(False)` is called after every step and may do nothing. The untrained head is no candidate,
    unless nothing trains.

    Raises:
        DataError: a loss is not finite.
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
    plan: Plan,
    log: Progress,
    save: Callable[[bool], None],
) -> None:
    """One round of `run_training`."""
    begin = time.perf_counter()
    take_steps(training, drawn=draw_epoch(training, train, plan), plan=plan, save=save)
    end_epoch(training, dev=dev, plan=plan, log=log, begin=begin)
    save(False)


def is_done(training: Fit[Any], plan: Plan) -> bool:
    patience = training.recipe.schedule.patience
    return training.step >= plan.n_steps or bool(patience and training.best.stale >= patience)


def _evaluate(training: Fit[Any], dev: FeaturePairs) -> RetrievalReport:
    begin = time.perf_counter()
    with training.with_outcome():
        report = training.evaluate(dev)
    training.evaluation_seconds += time.perf_counter() - begin
    return report


def evaluate_untrained(training: Fit[Any], dev: FeaturePairs, plan: Plan, log: Progress) -> None:
    """Epoch 0 of the history."""
    _record(training, report=_evaluate(training, dev), loss=math.nan, seconds=0.0, log=log)
    if not plan.n_steps:
        _keep(training, training.history[-1]["dev"]["mean_recall"])


def end_epoch(
    training: Fit[Any],
    dev: FeaturePairs,
    plan: Plan,
    log: Progress,
    begin: float,
) -> None:
    """Evaluate if it is time. `begin`: the clock at the epoch's beginning. Raises as `run_training`
    does."""
    require_finite(training)
    loss = _mean_loss(training)
    training.epoch = training.epoch + 1
    training.in_epoch = 0
    training.losses = []
    if (
        training.epoch % training.recipe.schedule.evaluate_every == 0
        or training.step >= plan.n_steps
    ):
        report = _evaluate(training, dev)
        _record(training, report=report, loss=loss, seconds=time.perf_counter() - begin, log=log)
        _keep(training, report.mean_recall)


def draw_epoch(training: Fit[Any], train: FeaturePairs, plan: Plan) -> Iterator[Batch]:
    """Batches of an epoch, or of the rest of one that was broken off."""
    recipe = training.recipe
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
    plan: Plan,
    save: Callable[[bool], None] = lambda _: None,
) -> None:
    """Steps on these batches up to the end of the epoch."""
    training.model.train()
    while training.in_epoch < plan.per_epoch and training.step < plan.n_steps:
        training.losses.append(_counted_step(training, islice(drawn, plan.accumulate), plan))
        training.step = training.step + 1
        training.in_epoch = training.in_epoch + 1
        if (
            training.in_epoch < plan.per_epoch and training.step < plan.n_steps
        ):  # an end is saved once it is evaluated
            save(False)


def _counted_step(training: Fit[Any], drawn: Iterator[Batch], plan: Plan) -> Tensor:
    """A step; the operations of the first are counted. All have the same shapes, so they are those
    of every step."""
    if training.step_flops is not None:
        return take_step(training, drawn, plan)
    with FlopCounterMode(display=False) as counter:
        loss = take_step(training, drawn, plan)
    training.step_flops = int(counter.get_total_flops())
    return loss


def take_step(training: Fit[Any], drawn: Iterator[Batch], plan: Plan) -> Tensor:
    """One step of the optimiser; returns its loss, still on the device."""
    assert training.optimiser is not None
    training.optimiser.zero_grad(set_to_none=True)
    total = torch.zeros((), device=training.device)
    for batch in drawn:
        total += training.add_gradients(batch, plan.accumulate)
    training.join_gradients()
    set_rates(training, plan)
    apply_update(training)
    return total


def set_rates(training: Fit[Any], plan: Plan) -> None:
    """The learning rates of the step that is to be taken."""
    optimiser = training.optimiser
    recipe = training.recipe
    assert optimiser is not None
    factor = learning_rate_factor(training.step, plan.n_steps, recipe.schedule)
    for group in optimiser.param_groups:
        group["lr"] = recipe.optimiser.lr * factor * group["factor"]


def apply_update(training: Fit[Any], update: Callable[[], object] | None = None) -> None:
    """The optimiser's part of a step, from gradients that are there. `update`: in place of the
    optimiser's own step.

    Reads nothing from the device, so that it can be recorded with an `update` whose rates are
    tensors."""
    model = training.model
    optimiser = training.optimiser
    recipe = training.recipe
    assert optimiser is not None
    if recipe.optimiser.clip:
        nn.utils.clip_grad_norm_(model.parameters(), recipe.optimiser.clip)
    (update or optimiser.step)()
    model.clamp()
    if training.average is not None:
        _follow(training.average, model, recipe.optimiser.ema)


@torch.no_grad()
def _follow(average: dict[str, Tensor], model: Trainable, decay: float) -> None:
    """Move the average of the weights; buffers, and what is no fraction, are taken as they are."""
    parameters = {name for name, _ in model.named_parameters()}
    for name, theirs in model.kept_state().items():
        if name in parameters:
            average[name].lerp_(theirs, 1 - decay)
        else:
            average[name].copy_(theirs)


def _cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def require_finite(training: Fit[Any]) -> None:
    """Raises DataError that names the first step of this epoch whose loss is not finite."""
    if not training.losses:
        return
    bad = (~torch.isfinite(torch.stack(training.losses))).nonzero()
    if len(bad):
        step = training.step - len(training.losses) + int(bad[0]) + 1
        raise DataError(
            f"the loss is not finite at step {step}; the last good checkpoint is that of step "
            f"{training.saved_step}; "
            "lower optimiser.lr, and add --overwrite"
        )


def _mean_loss(training: Fit[Any]) -> float:
    return float(torch.stack(training.losses).mean())


def _record(
    training: Fit[Any],
    report: RetrievalReport,
    loss: float,
    seconds: float,
    log: Progress,
) -> None:
    lr = (
        training.optimiser.param_groups[0]["lr"]
        if training.optimiser is not None and training.step
        else 0.0
    )
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
    if recall > training.best.recall:
        training.best = Best(
            epoch=training.epoch,
            recall=recall,
            stale=0,
            weights=_cloned(training.outcome),
        )
    else:
        training.best.stale += 1


def _has_steps(recipe: Recipe) -> bool:
    return recipe.schedule.epochs > 0 or recipe.schedule.steps > 0
