"""Members of a population that take their steps together, from one batched product to the next.

On CUDA, where launches of small products cost more than the products, the second step is recorded
and all later steps replay it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from apecache.device import send
from apecache.heads.head import EnsembleHead
from apecache.losses.registry import TILED_FROM
from apecache.recipes.recipe import AugmentationSpec
from apecache.sweeps.population.stacked_heads import MemberGenerators, StackedHeads
from apecache.sweeps.population.stacked_losses import stacked_info_nce
from apecache.sweeps.population.step_graph import StepGraph, recorder_of, try_to_record
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import apply_update, draw_epoch, rates_at, set_rates
from apecache.train.optim import direct_update, is_direct


class MemberGroup:
    """Train members that take their steps together.

    Args:
        places: Positions of the members in the population.
        members: The members, in the order of `places`.
        streams: The random states of these members.
        plan: The plan of every member.
    """

    def __init__(
        self,
        places: list[int],
        members: list[HeadFit],
        streams: MemberGenerators,
        plan: StepCount,
    ) -> None:
        self.places = places
        self.members = members
        self.streams = streams
        self.plan = plan
        models = [member.model for member in members]
        self.heads = (
            StackedHeads([model.image for model in models], streams),
            StackedHeads([model.text for model in models], streams),
        )
        self.temperatures = [_trained_parameters(model.temperature) for model in models]
        for parameters in self.temperatures:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.updates: list[Callable[[], object]] = []
        self.recorder = recorder_of(streams.device) if all(map(_can_be_recorded, members)) else None
        self.graphs: dict[bool, StepGraph] = {}
        n_groups = len(_optimizer(members[0]).param_groups)
        # A recorded step reads the rates from this tensor: numbers of the host would be frozen.
        self.rates = torch.zeros(len(members), n_groups, device=streams.device)

    def release(self) -> None:
        """Give members weights outside the stacks."""
        for heads in self.heads:
            heads.release()

    def take_steps(self, train: FeaturePairs, standardized: bool) -> None:
        """Take the rest of an epoch's steps.

        Args:
            train: The features to train on.
            standardized: Whether the features are standardized already.
        """
        members = self.members
        plan = self.plan
        batches_of_members = [draw_epoch(member, train, plan) for member in members]
        rates_of_steps = self._rates_of_epoch()
        while members[0].in_epoch < plan.per_epoch and members[0].step < plan.n_steps:
            self._set_rates(rates_of_steps)
            losses = self._step(batches_of_members, standardized)
            for member, loss in zip(members, losses.unbind(), strict=True):
                member.losses.append(loss)
                member.step = member.step + 1
                member.in_epoch = member.in_epoch + 1

    @torch.no_grad()
    def _step(
        self,
        batches_of_members: Sequence[Iterator[Batch]],
        standardized: bool,
    ) -> Tensor:
        """Take one step and return its losses, float [k]."""
        micro_batches = self._draw(batches_of_members)
        # The first step runs torch's own way: it makes the optimizer states that a record needs.
        if self.recorder is None or not self.updates:
            return self._whole_step(micro_batches, standardized)
        drawn_batches = list(micro_batches)
        if all(self._are_plain(batches) for batches in drawn_batches):
            graph = self._graph(drawn_batches, standardized)
            if graph:
                return graph(_inputs(drawn_batches))
        return self._whole_step(drawn_batches, standardized)

    def _draw(self, batches_of_members: Sequence[Iterator[Batch]]) -> Iterator[list[Batch]]:
        """Yield one batch of every member for each accumulation of a step.

        Lazily, so that one accumulation's batches are in memory at a time.
        """
        for _ in range(self.plan.accumulate):
            yield [next(batches) for batches in batches_of_members]

    def _whole_step(self, micro_batches: Iterable[list[Batch]], standardized: bool) -> Tensor:
        self._clear()
        losses = [self._add_gradients(batches, standardized) for batches in micro_batches]
        self._update()
        return torch.stack(losses).sum(0)

    def _graph(
        self,
        micro_batches: Sequence[list[Batch]],
        standardized: bool,
    ) -> StepGraph | None:
        """Return the recorded step, recorded now if need be; None where the device refuses."""
        if standardized not in self.graphs:
            assert self.recorder is not None
            step = self._recorded_step(standardized)
            graph = try_to_record(step, _inputs(micro_batches), self.recorder)
            if graph is None:
                self.recorder = None
                # These updates read rates from a tensor that is no longer written.
                self.updates = []
                return None
            self.graphs[standardized] = graph
        return self.graphs[standardized]

    def _recorded_step(self, standardized: bool) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return `_whole_step` of plain batches, without anything that only the host can do."""

        def step(inputs: Sequence[Tensor]) -> Tensor:
            self._clear()
            losses = []
            for image, text in zip(inputs[::2], inputs[1::2], strict=True):
                image_embedding, text_embedding = self._forward(image, text, standardized)
                contrast = self._contrast(image_embedding, text_embedding)
                losses.append(self._backward(*contrast))
            for member, update in zip(self.members, self.updates, strict=True):
                apply_update(member, update)
            return torch.stack(losses).sum(0)

        return step

    def _clear(self) -> None:
        for heads in self.heads:
            heads.forget()
        for parameters in self.temperatures:
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.zero_()

    def _rates_of_epoch(self) -> Iterator[Tensor]:
        """Send the rates of the steps that are left of an epoch, and yield those of each step.

        One copy for all of them: a copy in each step would wait for the device. Each is float32
        [k, groups]; there are none where steps are not recorded.
        """
        if self.recorder is None:
            return iter(())
        first = self.members[0]
        n_left = min(self.plan.per_epoch - first.in_epoch, self.plan.n_steps - first.step)
        rates_of_steps = []
        for step in range(first.step, first.step + n_left):
            rates_of_steps.append([rates_at(member, step, self.plan) for member in self.members])
        return iter(send(torch.tensor(rates_of_steps), self.rates.device).unbind())

    def _set_rates(self, rates_of_steps: Iterator[Tensor]) -> None:
        for member in self.members:
            set_rates(member, self.plan)
        # None are left where the device refused to record.
        rates = next(rates_of_steps, None)
        if rates is not None:
            self.rates.copy_(rates)

    def _update(self) -> None:
        """Update all members.

        The first time by `Optimizer.step`, which makes the state of an optimizer where it has none.
        """
        updates = self.updates or [_optimizer(member).step for member in self.members]
        for member, update in zip(self.members, updates, strict=True):
            apply_update(member, update)
        if self.updates:
            return
        rates = [None] * len(self.members) if self.recorder is None else self.rates.unbind()
        direct_updates = []
        for member, member_rates in zip(self.members, rates, strict=True):
            direct_updates.append(direct_update(_optimizer(member), member_rates))
        self.updates = direct_updates

    def _add_gradients(self, member_batches: Sequence[Batch], standardized: bool) -> Tensor:
        batches = [self._seen(i, batch) for i, batch in enumerate(member_batches)]
        image, text = self._forward(*_stacked(batches), standardized)
        if self._are_plain(batches):
            contrast = self._contrast(image, text)
        else:
            contrast = self._one_by_one(batches, image, text)
        return self._backward(*contrast)

    def _are_plain(self, batches: Sequence[Batch]) -> bool:
        pairs = zip(self.members, batches, strict=True)
        return all(_is_plain(member, batch) for member, batch in pairs)

    def _forward(self, image: Tensor, text: Tensor, standardized: bool) -> tuple[Tensor, Tensor]:
        image_heads, text_heads = self.heads
        image_embedding = image_heads.forward(image, standardized)
        text_embedding = text_heads.forward(text, standardized)
        return image_embedding, text_embedding

    def _backward(self, losses: Tensor, by_image: Tensor, by_text: Tensor) -> Tensor:
        image_heads, text_heads = self.heads
        image_heads.backward(by_image)
        text_heads.backward(by_text)
        return losses

    def _seen(self, i: int, batch: Batch) -> Batch:
        """Return the batch of member `i` after its augmentation."""
        training = self.members[i]
        if training.recipe.augmentation == AugmentationSpec():
            return batch
        with self.streams.use(i):
            return augment(
                batch,
                spec=training.recipe.augmentation,
                image=training.model.image,
                text=training.model.text,
            )

    def _contrast(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute InfoNCE of every member, and add the gradients of the temperatures.

        Args:
            image: Embeddings, float [k, n, dim].
            text: Embeddings, float [k, n, dim].

        Returns:
            Losses, float [k], and their gradients by image and by text, float [k, n, dim].
        """
        scale = _stack([member.model.temperature.scale() for member in self.members])
        losses, (by_image, by_text, by_scale) = stacked_info_nce(image, text, scale)
        if self.plan.accumulate > 1:
            for tensor in (losses, by_image, by_text, by_scale):
                tensor.div_(self.plan.accumulate)
        slopes = _stack([member.model.temperature.scale_slope() for member in self.members])
        by_temperature = by_scale.mul_(slopes).unbind()
        for parameters, gradient in zip(self.temperatures, by_temperature, strict=True):
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.add_(gradient)
        return losses, by_image, by_text

    def _one_by_one(
        self,
        batches: Sequence[Batch],
        image: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `_contrast` does for any loss, by autograd.

        Member by member, so that the logits of one are in memory at a time.
        """
        losses = []
        by_image = torch.empty_like(image)
        by_text = torch.empty_like(text)
        for i, (member, batch) in enumerate(zip(self.members, batches, strict=True)):
            image_row = image[i].detach().requires_grad_()
            text_row = text[i].detach().requires_grad_()
            with torch.enable_grad():
                loss = member.model.loss_of(batch, image_row, text_row, member.step)
                loss = loss / self.plan.accumulate
                loss.backward()
            losses.append(loss.detach())
            assert image_row.grad is not None
            assert text_row.grad is not None
            by_image[i] = image_row.grad
            by_text[i] = text_row.grad
        return torch.stack(losses), by_image, by_text


def _optimizer(member: HeadFit) -> torch.optim.Optimizer:
    assert member.optimizer is not None
    return member.optimizer


def _trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    # A view of a single tensor: `torch.stack` would copy it.
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _inputs(micro_batches: Sequence[Sequence[Batch]]) -> list[Tensor]:
    """List the stacked images and texts of each accumulation in turn."""
    tensors: list[Tensor] = []
    for batches in micro_batches:
        tensors.extend(_stacked(batches))
    return tensors


def _stacked(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    image = _stack([batch.image for batch in batches])
    text = _stack([batch.text for batch in batches])
    return image, text


def _can_be_recorded(member: HeadFit) -> bool:
    """Return whether steps draw no random numbers and the optimizer takes a tensor of rates."""
    modules = member.model.modules()
    draws = any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)
    return (
        not draws
        and member.recipe.augmentation == AugmentationSpec()
        and is_direct(_optimizer(member))
    )


def _is_plain(member: HeadFit, batch: Batch) -> bool:
    """Return whether the stacked loss is this member's loss on this batch."""
    loss = member.recipe.loss
    is_ensemble = isinstance(member.model.image, EnsembleHead)
    is_small = len(batch.image) * len(batch.text) <= TILED_FROM
    return (
        loss.kind == "infonce"
        and not loss.structure
        and batch.groups is None
        and is_small
        and not is_ensemble
    )
