"""Members of a population that take their steps together, from one batched product to the next.

On an accelerator launches of small operations cost more than the operations. There all members
share the logits of one batched product, one optimizer and one draw of dropout masks. The second
step is recorded, and all later ones replay it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from apecache.device import float32_products, send
from apecache.heads.head import EnsembleHead
from apecache.heads.tokens import masked_mean
from apecache.losses.registry import TILED_FROM, structure_weight
from apecache.recipes.recipe import AugmentationSpec
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.stacked_batches import StackedBatch, draw_stacked
from apecache.sweeps.population.stacked_heads import StackedHeads
from apecache.sweeps.population.stacked_losses import (
    Gradients,
    batched_info_nce,
    batched_sigmoid,
    batched_structure,
    stacked_info_nce,
    stacked_sigmoid,
)
from apecache.sweeps.population.stacked_optimizer import StackedOptimizer, can_share_optimizer
from apecache.sweeps.population.stacked_parameter import StackedParameter
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import apply_update, set_rates
from apecache.train.optim import direct_update
from apecache.train.step_graph import StepGraph, recorder_of


class MemberGroup:
    """Train members that take their steps together.

    Args:
        places: Positions of the members in the population.
        members: The members, in the order of `places`.
        streams: The random states of these members.
        plan: The plan of every member.
        few_launches: Whether operations are shared where that saves launches, as on accelerators.
            Dropout then draws from the states of the first member alone.
    """

    def __init__(
        self,
        places: list[int],
        members: list[HeadFit],
        streams: MemberGenerators,
        plan: StepCount,
        few_launches: bool,
    ) -> None:
        self.places = places
        self.members = members
        self.streams = streams
        self.plan = plan
        self.few_launches = few_launches
        models = [member.model for member in members]
        # With few launches all members share the masks of the first one.
        mask_streams = None if few_launches else streams
        self.heads = (
            StackedHeads([model.image for model in models], mask_streams),
            StackedHeads([model.text for model in models], mask_streams),
        )
        # Members of one group have the same kind of temperature (see `stack_key`).
        self.is_log = models[0].temperature.parameter_name == "log_scale"
        self.temperature = StackedParameter([model.temperature.parameter for model in models])
        self.temperatures = [self.temperature]
        if models[0].temperature.bias is not None:
            self.temperatures.append(
                StackedParameter([_bias_of(model.temperature.bias) for model in models])
            )
        device = streams.device
        bounds = torch.tensor([model.temperature.bounds for model in models])
        self.lowest, self.highest = bounds.to(device).unbind(1)
        self.updates: list[Callable[[], object]] = []
        self.shared: StackedOptimizer | None = None
        if few_launches and can_share_optimizer(members):
            self.shared = StackedOptimizer(members, self._stacks())
        # A recorded step runs the same kernels again: only the values of its inputs may differ.
        self.recorder = recorder_of(device) if self._can_be_recorded() else None
        self.graphs: dict[bool, StepGraph] = {}
        self.is_warm = False

    def _stacks(self) -> list[StackedParameter]:
        """Return all stacked parameters."""
        image_heads, text_heads = self.heads
        return [*self.temperatures, *image_heads.joined, *text_heads.joined]

    def _can_be_recorded(self) -> bool:
        """Return whether a step does the same whatever its batches are."""
        return self.shared is not None and all(
            _is_plain(member) and member.recipe.augmentation == AugmentationSpec()
            for member in self.members
        )

    def release(self) -> None:
        """Give members weights outside the stacks."""
        if self.shared is not None:
            self.shared.release()
        for stack in self._stacks():
            stack.release()

    def take_steps(self, train: FeaturePairs, standardized: bool) -> None:
        """Take the rest of an epoch's steps.

        Args:
            train: The features to train on.
            standardized: Whether the features are standardized already.
        """
        members = self.members
        plan = self.plan
        drawn_batches = draw_stacked(members, train, plan)
        scalars_of_steps = self._scalars_of_epoch()
        with float32_products(self.streams.device, tf32=True), self._masks():
            # Members of a group are always at the same step.
            while members[0].in_epoch < plan.per_epoch and members[0].step < plan.n_steps:
                for member in members:
                    set_rates(member, plan)
                losses = self._step(drawn_batches, standardized, next(scalars_of_steps, None))
                for member, loss in zip(members, losses.unbind(), strict=True):
                    member.losses.append(loss)
                    member.step = member.step + 1
                    member.in_epoch = member.in_epoch + 1

    def _masks(self) -> AbstractContextManager[None]:
        """Let shared masks be drawn from the states of the first member."""
        return self.streams.use(0) if self.few_launches else nullcontext()

    @torch.no_grad()
    def _step(
        self,
        batch_iterator: Iterator[StackedBatch],
        standardized: bool,
        scalars: Tensor | None,
    ) -> Tensor:
        """Take one step and return its losses, float [k]."""
        micro_batches = (next(batch_iterator) for _ in range(self.plan.accumulate))
        # The first step makes what a record needs, such as the handles of libraries.
        if self.recorder is None or not self.is_warm:
            self.is_warm = True
            return self._whole_step(micro_batches, standardized, scalars)
        drawn_batches = list(micro_batches)
        # A batch with groups needs another loss, which the recording does not hold.
        if all(self._are_plain(batch) for batch in drawn_batches):
            graph = self._graph(drawn_batches, standardized, scalars)
            if graph:
                return graph(_inputs(drawn_batches, scalars))
        return self._whole_step(drawn_batches, standardized, scalars)

    def _whole_step(
        self,
        micro_batches: Iterable[StackedBatch],
        standardized: bool,
        scalars: Tensor | None,
    ) -> Tensor:
        self._clear()
        losses = [self._add_gradients(batch, standardized) for batch in micro_batches]
        self._update(scalars)
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)

    def _graph(
        self,
        micro_batches: Sequence[StackedBatch],
        standardized: bool,
        scalars: Tensor | None,
    ) -> StepGraph | None:
        """Return the recorded step, recorded now if need be; None where the device refuses."""
        if standardized not in self.graphs:
            assert self.recorder is not None
            step = self._recorded_step(standardized, micro_batches)
            graph = StepGraph(step, _inputs(micro_batches, scalars), self.recorder)
            # Not tried again: a device that refuses once refuses every time.
            if not graph.is_recorded:
                self.recorder = None
                return None
            self.graphs[standardized] = graph
        return self.graphs[standardized]

    def _recorded_step(
        self,
        standardized: bool,
        micro_batches: Sequence[StackedBatch],
    ) -> Callable[[Sequence[Tensor]], Tensor]:
        """Return `_whole_step` of plain batches, without anything that only the host can do.

        Args:
            standardized: As of `take_steps`.
            micro_batches: Batches that have masks where those of the step have them.
        """

        def step(inputs: Sequence[Tensor]) -> Tensor:
            scalars, *features = inputs
            tensors = iter(features)
            batches = [batch.with_tensors(tensors) for batch in micro_batches]
            return self._whole_step(batches, standardized, scalars)

        return step

    def _clear(self) -> None:
        for heads in self.heads:
            heads.forget()
        for stack in self.temperatures:
            # Losses by autograd add to gradients that exist.
            if stack.gradient is not None:
                stack.gradient.zero_()
            stack.fresh = False

    def _scalars_of_epoch(self) -> Iterator[Tensor]:
        """Send the numbers of the updates that are left of an epoch, and yield those of each step.

        One copy for all of them: a copy in each step would wait for the device. There are none
        where each member has an optimizer of its own.
        """
        if self.shared is None:
            return iter(())
        first = self.members[0]
        # One transfer for the whole epoch in place of one for each step.
        n_left = min(self.plan.per_epoch - first.in_epoch, self.plan.n_steps - first.step)
        scalars_of_steps = []
        for step in range(first.step, first.step + n_left):
            scalars_of_steps.append(self.shared.scalars_at(step, self.plan))
        return iter(send(torch.tensor(scalars_of_steps), self.streams.device).unbind())

    def _update(self, scalars: Tensor | None) -> None:
        """Update all members.

        Optimizers of the members' own take their first step by `Optimizer.step`, which makes the
        state of an optimizer where it has none.
        """
        if self.shared is not None:
            assert scalars is not None
            self.shared.update(scalars)
            self.temperature.value.clamp_(self.lowest, self.highest)
            self.shared.follow()
            return
        # The first step builds the state of the optimizers, which the direct updates need.
        updates = self.updates or [_optimizer(member).step for member in self.members]
        for member, update in zip(self.members, updates, strict=True):
            apply_update(member, update)
        if not self.updates:
            self.updates = [direct_update(_optimizer(member)) for member in self.members]

    def _add_gradients(self, batch: StackedBatch, standardized: bool) -> Tensor:
        seen_batch = self._seen(batch)
        image, text = self._forward(seen_batch, standardized)
        if self._are_plain(seen_batch):
            contrast = self._contrast(image, text)
        elif self._are_sigmoid(seen_batch):
            contrast = self._contrast_pairs(seen_batch, image, text)
        elif self._are_structured(seen_batch):
            contrast = self._contrast_structured(seen_batch, image, text)
        else:
            contrast = self._one_by_one(seen_batch, image, text)
        return self._backward(*contrast)

    def _are_plain(self, batch: StackedBatch) -> bool:
        """Return whether the stacked loss is the loss of every member on this batch."""
        return (
            _fits_whole(batch)
            and all(groups is None for groups in batch.groups)
            and all(map(_is_plain, self.members))
        )

    def _are_sigmoid(self, batch: StackedBatch) -> bool:
        """Return whether the stacked sigmoid loss is the loss of every member on this batch."""
        return _fits_whole(batch) and all(_is_alone(member, "sigmoid") for member in self.members)

    def _are_structured(self, batch: StackedBatch) -> bool:
        """Return whether every member has InfoNCE, and the structure term for all is one call.

        On a CPU the similarities of one member at a time are in memory.
        """
        divergences = {member.recipe.loss.structure_divergence for member in self.members}
        return (
            self.few_launches
            and _fits_whole(batch)
            and batch.image.shape[1] == batch.text.shape[1]
            and all(groups is None for groups in batch.groups)
            and all(_is_whole(member, "infonce") for member in self.members)
            and len(divergences) == 1
        )

    def _forward(self, batch: StackedBatch, standardized: bool) -> tuple[Tensor, Tensor]:
        image_heads, text_heads = self.heads
        image_embedding = image_heads.forward(batch.image, batch.image_mask, standardized)
        text_embedding = text_heads.forward(batch.text, batch.text_mask, standardized)
        return image_embedding, text_embedding

    def _backward(self, losses: Tensor, by_image: Tensor, by_text: Tensor) -> Tensor:
        image_heads, text_heads = self.heads
        image_heads.backward(by_image)
        text_heads.backward(by_text)
        return losses

    def _seen(self, batch: StackedBatch) -> StackedBatch:
        """Return the batch after each member's augmentation."""
        if all(member.recipe.augmentation == AugmentationSpec() for member in self.members):
            return batch
        return StackedBatch.join(
            [self._augmented(i, batch.of(i)) for i in range(len(self.members))]
        )

    def _augmented(self, i: int, batch: Batch) -> Batch:
        training = self.members[i]
        if training.recipe.augmentation == AugmentationSpec():
            return batch
        states = nullcontext() if self.few_launches else self.streams.use(i)
        with states:
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
        info_nce = batched_info_nce if self.few_launches else stacked_info_nce
        scale = self._scale()
        losses, gradients = info_nce(image, text, scale)
        return self._kept(losses, gradients, scale)

    def _contrast_pairs(
        self,
        batch: StackedBatch,
        image: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the sigmoid loss of every member, as `_contrast` does InfoNCE."""
        sigmoid = batched_sigmoid if self.few_launches else stacked_sigmoid
        scale = self._scale()
        bias = self.temperatures[1]
        losses, gradients, by_bias = sigmoid(image, text, scale, bias.value, _positives(batch))
        bias.add(by_bias.div_(self.plan.accumulate))
        return self._kept(losses, gradients, scale)

    def _contrast_structured(
        self,
        batch: StackedBatch,
        image: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute InfoNCE and the structure term of every member, as `_contrast` does InfoNCE."""
        specs = [member.recipe.loss for member in self.members]
        weights = [
            structure_weight(member.step, member.recipe.loss) / self.plan.accumulate
            for member in self.members
        ]
        temperatures = [spec.structure_temperature for spec in specs]
        # One transfer for both.
        numbers = send(torch.tensor([weights, temperatures]), image.device)
        weight, temperature = numbers.unbind()
        losses, gradients = batched_structure(
            [
                (_compared(batch.image, batch.image_mask), image),
                (_compared(batch.text, batch.text_mask), text),
            ],
            weight=weight,
            temperature=temperature,
            divergence=specs[0].structure_divergence,
        )
        contrast, by_image, by_text = self._contrast(image, text)
        return contrast + losses, by_image + gradients[0], by_text + gradients[1]

    def _scale(self) -> Tensor:
        """Return the factor of the cosines of every member, float [k]."""
        return self.temperature.value.exp() if self.is_log else 1 / self.temperature.value

    def _kept(
        self,
        losses: Tensor,
        gradients: Gradients,
        scale: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the gradient of the temperatures, and return losses and those of embeddings."""
        by_image, by_text, by_log_scale = gradients
        # The mean over the accumulated batches, as in a fit of one member.
        if self.plan.accumulate > 1:
            for tensor in (losses, by_image, by_text, by_log_scale):
                tensor.div_(self.plan.accumulate)
        # The loss gives the gradient by log(1 / T), which is -T times that by T.
        self.temperature.add(by_log_scale if self.is_log else by_log_scale.mul(scale).neg_())
        return losses, by_image, by_text

    def _one_by_one(
        self,
        batch: StackedBatch,
        image: Tensor,
        text: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `_contrast` does for any loss, by autograd.

        Member by member, so that the logits of one are in memory at a time.
        """
        losses = []
        by_image = torch.empty_like(image)
        by_text = torch.empty_like(text)
        for i, member in enumerate(self.members):
            # Cut off from the heads: their gradients come from `_backward`.
            image_row = image[i].detach().requires_grad_()
            text_row = text[i].detach().requires_grad_()
            with torch.enable_grad():
                loss = member.model.loss_of(batch.of(i), image_row, text_row, member.step)
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


def _bias_of(bias: nn.Parameter | None) -> nn.Parameter:
    assert bias is not None
    return bias


def _inputs(micro_batches: Sequence[StackedBatch], scalars: Tensor | None) -> list[Tensor]:
    """List the numbers of the update, then the tensors of each accumulation in turn."""
    assert scalars is not None
    tensors = [scalars]
    for batch in micro_batches:
        tensors += batch.tensors()
    return tensors


def _is_plain(member: HeadFit) -> bool:
    """Return whether the stacked loss is this member's loss."""
    return _is_alone(member, "infonce")


def _is_alone(member: HeadFit, kind: str) -> bool:
    """Return whether a member's loss is of this kind, on whole embeddings, with no other term."""
    return _is_whole(member, kind) and not member.recipe.loss.structure


def _is_whole(member: HeadFit, kind: str) -> bool:
    """Return whether a member's loss of pairs is of this kind, on whole embeddings."""
    loss = member.recipe.loss
    is_ensemble = isinstance(member.model.image, EnsembleHead)
    return loss.kind == kind and not loss.matryoshka and not is_ensemble


def _compared(features: Tensor, masks: Tensor | None) -> Tensor:
    """Return what the structure term compares, [k, n, dim]: of tokens their mean."""
    if features.ndim == 3:
        return features
    mask = None if masks is None else masks.flatten(0, 1)
    pooled = masked_mean(features.flatten(0, 1).float(), mask)
    by_member: Tensor = pooled.unflatten(0, (len(features), -1))
    return by_member


def _fits_whole(batch: StackedBatch) -> bool:
    """Return whether a member's logits are computed at once, and not in tiles."""
    return batch.image.shape[1] * batch.text.shape[1] <= TILED_FROM


def _positives(batch: StackedBatch) -> Tensor:
    """Return which pairs are positive, bool [k, n, m] or, where all are row with row, [1, n, n]."""
    if all(groups is None for groups in batch.groups):
        n_rows = batch.image.shape[1]
        return torch.eye(n_rows, dtype=torch.bool, device=batch.image.device)[None]
    # The others have groups of one.
    own_row = torch.arange(batch.image.shape[1], device=batch.image.device)
    images = [own_row if groups is None else groups.image for groups in batch.groups]
    texts = [own_row if groups is None else groups.text for groups in batch.groups]
    return torch.stack(images).unsqueeze(2) == torch.stack(texts).unsqueeze(1)
