"""Hold everything that a fit changes: weights, optimizer, averages, best weights, random states.

A checkpoint holds that state, so that an interrupted fit resumes as if it had never stopped.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from apecache.device import (
    generator_states,
    is_accelerator,
    seeded_generators,
    set_generator_states,
)
from apecache.errors import RunError
from apecache.fingerprint import Json
from apecache.losses.registry import LossTerms
from apecache.metrics.retrieval import RetrievalReport
from apecache.recipes.recipe import Recipe
from apecache.runs.checkpoint import flatten_optimizer, restore_optimizer
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs, n_batches
from apecache.train.best_epoch import BestEvaluation
from apecache.train.model import AlignmentModel, evaluate_model
from apecache.train.optim import build_optimizer


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
        count = n_batches(train, recipe.schedule.batch_size, recipe.schedule.epoch)
        accumulate = min(recipe.schedule.accumulate, count)
        per_epoch = count // accumulate
        return StepCount(
            n_steps=recipe.schedule.steps or per_epoch * recipe.schedule.epochs,
            per_epoch=per_epoch,
            accumulate=accumulate,
        )


class Trainable(Protocol):
    """Describe what a fit and its checks need of a model.

    `rates` returns what trains, with factors of the learning rate, and `undecayed` what of it is
    not decayed whatever its dimensions. `kept_state` returns all that a
    fit can change, the temperature included, by the names of `named_parameters` and buffers.
    """

    @property
    def temperature(self) -> Any: ...
    def rates(self) -> list[tuple[nn.Parameter, float]]: ...
    def undecayed(self) -> list[nn.Parameter]: ...
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
        losses: Losses of these steps, as `add_loss` keeps them.
        contrastive: Sum of the contrastive terms of these steps, a scalar on the device; None
            where the loss has no other term.
        seconds: Time of training and evaluation, without loading.
        saved_step: Step of the last checkpoint.
        step_flops: Operations of one step; None before the first step.
    """

    def __init__(self, model: Model, recipe: Recipe, seed: int) -> None:
        self.model = model
        self.recipe = recipe
        rates = model.rates()
        self.optimizer = None
        if rates and recipe.has_steps:
            self.optimizer = build_optimizer(rates, recipe.optimizer, model.undecayed())
        self.device = model.temperature.parameter.device
        self.average = cloned_tensors(model.kept_state()) if recipe.optimizer.ema else None
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch_draws = self.generator.get_state()
        self.epoch = 0
        self.step = 0
        self.in_epoch = 0
        self.losses: list[Tensor | float] = []
        self.contrastive: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        self.best = BestEvaluation()
        self.seconds = 0.0
        self.saved_step = 0
        self.evaluation_seconds = 0.0
        self.loading_seconds = 0.0
        self.step_flops: int | None = None

    def add_loss(self, loss: Tensor) -> None:
        """Keep the loss of a step of the present epoch, without waiting for an accelerator."""
        # On the CPU as a number: a small tensor that stays among the large ones of a step keeps
        # their memory from being used again.
        self.losses.append(loss if is_accelerator(self.device) else float(loss))

    def epoch_losses(self) -> Tensor:
        """Return the losses of the present epoch, float32 [steps], on the device."""
        return torch.stack([torch.as_tensor(loss) for loss in self.losses])

    def add_terms(self, terms: LossTerms, accumulate: int) -> Tensor:
        """Return the loss of a batch divided by `accumulate`, and add up its contrastive term.

        The sum stays on the device, at one address, so that a recorded step can add to it.
        """
        if terms.contrastive is not None:
            if self.contrastive is None:
                self.contrastive = torch.zeros_like(terms.contrastive)
            self.contrastive += terms.contrastive / accumulate
        return terms.total / accumulate

    def mean_contrastive(self) -> float | None:
        """Return the mean contrastive term of the present epoch; None without other terms."""
        return None if self.contrastive is None else float(self.contrastive) / len(self.losses)

    def forget_losses(self) -> None:
        """Drop the losses of an epoch, for those of the next one."""
        self.losses = []
        if self.contrastive is not None:
            self.contrastive.zero_()

    @abstractmethod
    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Measure retrieval on dev with the model's present weights, without dropout."""

    @abstractmethod
    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        """Add the gradients of a batch's loss divided by `accumulate`.

        Returns:
            The divided loss, on the device, detached.
        """

    def read_ahead(self, drawn: Iterator[Batch]) -> Iterator[Batch]:
        """Return the batches of an epoch; a fit may begin to read what the next one needs."""
        return drawn

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
        weights = cloned_tensors(self.model.kept_state())
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
        losses = {"epoch": self.epoch_losses()} if self.losses else {}
        if self.contrastive is not None:
            losses["contrastive"] = self.contrastive
        tensor_groups["losses"] = losses
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
            losses = tensor_groups.get("losses", {})
            self.losses = []
            for loss in losses.get("epoch", torch.empty(0)).unbind():
                self.add_loss(loss.to(self.device))
            if "contrastive" in losses:
                self.contrastive = losses["contrastive"].to(self.device)
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


class HeadFit(Fit[AlignmentModel]):
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
        loss = self.add_terms(model.terms(augmented, self.step), accumulate)
        loss.backward()
        return loss.detach()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators, for dropout and noise, and restore them at the end."""
    with seeded_generators(seed, device):
        yield


def cloned_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy the tensors, without graphs."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
