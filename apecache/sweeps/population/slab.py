"""Members of a population that take their steps together, from one batched product to the next.

Where launches cost more than the products, on CUDA, the second step is recorded and all others
replay it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from apecache.heads.head import SeveralHeads
from apecache.losses.objective import TILED_FROM
from apecache.recipes.recipe import AugmentationSpec
from apecache.sweeps.population.stacked_heads import StackedHeads, Streams
from apecache.sweeps.population.stacked_losses import stacked_info_nce
from apecache.sweeps.population.step_graph import StepGraph, recorder_of, try_to_record
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.loop import Plan, Training, apply_update, draw_epoch, set_rates
from apecache.train.optim import direct_update, is_direct


class Slab:
    """Members that take their steps together; `places` are theirs in the population."""

    def __init__(
        self,
        places: list[int],
        members: list[Training],
        streams: Streams,
        plan: Plan,
    ) -> None:
        self.places = places
        self.members = members
        self.streams = streams
        self.plan = plan
        models = [member.model for member in members]
        self.heads = (
            StackedHeads([m.image for m in models], streams),
            StackedHeads([m.text for m in models], streams),
        )
        self.temperatures = [
            [p for p in m.temperature.parameters() if p.requires_grad] for m in models
        ]
        for parameter in (p for parameters in self.temperatures for p in parameters):
            parameter.grad = torch.zeros_like(parameter)
        self.updates: list[Callable[[], object]] = []
        self.recorder = recorder_of(streams.device) if all(map(_can_be_recorded, members)) else None
        self.graphs: dict[bool, StepGraph] = {}
        n_groups = len(_optimiser(members[0]).param_groups)
        self.rates = torch.zeros(len(members), n_groups, device=streams.device)

    def release(self) -> None:
        for heads in self.heads:
            heads.release()

    def take_steps(self, train: FeaturePairs, standardised: bool) -> None:
        members = self.members
        plan = self.plan
        drawn = [draw_epoch(member, train, plan) for member in members]
        while members[0].in_epoch < plan.per_epoch and members[0].step < plan.n_steps:
            for member, loss in zip(members, self._step(drawn, standardised).unbind(), strict=True):
                member.losses.append(loss)
                member.step = member.step + 1
                member.in_epoch = member.in_epoch + 1

    @torch.no_grad()
    def _step(self, drawn: Sequence[Iterator[Batch]], standardised: bool) -> Tensor:
        """float [k]: losses of one step."""
        self._set_rates()
        parts = ([next(part) for part in drawn] for _ in range(self.plan.accumulate))
        if self.recorder is None or not self.updates:
            return self._whole_step(parts, standardised)
        known = list(parts)
        if all(self._are_plain(batches) for batches in known) and (
            graph := self._graph(known, standardised)
        ):
            return graph(_inputs(known))
        return self._whole_step(known, standardised)

    def _whole_step(self, parts: Iterable[list[Batch]], standardised: bool) -> Tensor:
        self._clear()
        losses = [self._add_gradients(batches, standardised) for batches in parts]
        self._update()
        return torch.stack(losses).sum(0)

    def _graph(self, parts: Sequence[list[Batch]], standardised: bool) -> StepGraph | None:
        """Recorded at the first of such steps; None where the device refuses."""
        if standardised not in self.graphs:
            assert self.recorder is not None
            if (
                graph := try_to_record(
                    self._recorded_step(standardised),
                    _inputs(parts),
                    self.recorder,
                )
            ) is None:
                self.recorder = None
                self.updates = []
                return None
            self.graphs[standardised] = graph
        return self.graphs[standardised]

    def _recorded_step(self, standardised: bool) -> Callable[[Sequence[Tensor]], Tensor]:
        """`_whole_step` of plain batches, without anything that only the host could do."""

        def step(inputs: Sequence[Tensor]) -> Tensor:
            self._clear()
            pairs = zip(inputs[::2], inputs[1::2], strict=True)
            embedded = (self._forward(image, text, standardised) for image, text in pairs)
            losses = [self._backward(*self._contrast(*pair)) for pair in embedded]
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

    def _set_rates(self) -> None:
        for member in self.members:
            set_rates(member, self.plan)
        if self.recorder is not None:
            rates = [
                [group["lr"] for group in _optimiser(member).param_groups]
                for member in self.members
            ]
            self.rates.copy_(torch.tensor(rates))

    def _update(self) -> None:
        """The first time torch's way, which makes the state of an optimiser where there is none."""
        updates = self.updates or [_optimiser(member).step for member in self.members]
        for member, update in zip(self.members, updates, strict=True):
            apply_update(member, update)
        rates = [None] * len(self.members) if self.recorder is None else self.rates.unbind()
        pairs = zip(self.members, rates, strict=True)
        self.updates = self.updates or [
            direct_update(_optimiser(member), own) for member, own in pairs
        ]

    def _add_gradients(self, drawn: Sequence[Batch], standardised: bool) -> Tensor:
        batches = [self._seen(i, batch) for i, batch in enumerate(drawn)]
        image, text = self._forward(*_stacked(batches), standardised)
        contrast = (
            self._contrast if self._are_plain(batches) else partial(self._one_by_one, batches)
        )
        return self._backward(*contrast(image, text))

    def _are_plain(self, batches: Sequence[Batch]) -> bool:
        return all(
            _is_plain(member, batch) for member, batch in zip(self.members, batches, strict=True)
        )

    def _forward(self, image: Tensor, text: Tensor, standardised: bool) -> tuple[Tensor, Tensor]:
        return self.heads[0].forward(image, standardised), self.heads[1].forward(text, standardised)

    def _backward(self, losses: Tensor, *gradients: Tensor) -> Tensor:
        for heads, gradient in zip(self.heads, gradients, strict=True):
            heads.backward(gradient)
        return losses

    def _seen(self, i: int, batch: Batch) -> Batch:
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
        """Losses, and their gradients by the embeddings; those by the temperatures are added where
        they belong."""
        scale = _stack([member.model.temperature.scale() for member in self.members])
        losses, (by_image, by_text, by_scale) = stacked_info_nce(image, text, scale)
        if self.plan.accumulate > 1:
            for part in (losses, by_image, by_text, by_scale):
                part.div_(self.plan.accumulate)
        for parameters, gradient in zip(
            self.temperatures,
            by_scale.mul_(scale).unbind(),
            strict=True,
        ):
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
        """The same for any loss, a member after the other, so that the logits of one are in memory
        at a time."""
        losses = []
        gradients = (torch.empty_like(image), torch.empty_like(text))
        for i, (member, batch) in enumerate(zip(self.members, batches, strict=True)):
            pair = image[i].detach().requires_grad_(), text[i].detach().requires_grad_()
            with torch.enable_grad():
                loss = member.model.loss_of(batch, *pair, member.step) / self.plan.accumulate
                loss.backward()
            losses.append(loss.detach())
            for gradient, row in zip(gradients, pair, strict=True):
                assert row.grad is not None
                gradient[i] = row.grad
        return torch.stack(losses), *gradients


def _optimiser(member: Training) -> torch.optim.Optimizer:
    assert member.optimiser is not None
    return member.optimiser


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(list(parts))


def _inputs(parts: Sequence[Sequence[Batch]]) -> list[Tensor]:
    """Of each part the images of all members and their texts, one after the other."""
    return [tensor for batches in parts for tensor in _stacked(batches)]


def _stacked(batches: Sequence[Batch]) -> tuple[Tensor, Tensor]:
    return _stack([batch.image for batch in batches]), _stack([batch.text for batch in batches])


def _can_be_recorded(member: Training) -> bool:
    """Whether steps draw no random numbers, and the optimiser takes its rate from a tensor."""
    random = any(isinstance(m, nn.Dropout) and m.p > 0 for m in member.model.modules())
    return (
        not random
        and member.recipe.augmentation == AugmentationSpec()
        and is_direct(_optimiser(member))
    )


def _is_plain(member: Training, batch: Batch) -> bool:
    """Whether the stacked loss is this member's."""
    loss = member.recipe.loss
    several = isinstance(member.model.image, SeveralHeads)
    small = len(batch.image) * len(batch.text) <= TILED_FROM
    return (
        loss.kind == "infonce"
        and not loss.structure
        and batch.groups is None
        and small
        and not several
    )
