"""Many small heads trained together: every member ends where a fit of its own would, up to rounding.

Members of one structure, batch size and number of steps share batched products; all else is a member's own and goes
through the code of the ordinary trainer: optimiser, schedule, temperature, augmentation, batches, dropout, evaluation.
A member that is done, dropped or no longer finite leaves the stack, and the stack shrinks. (The bias of a layer before
a batch norm changes nothing and has no gradient but rounding, which Adam amplifies: it alone may end elsewhere.)
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from apecache.errors import DataError
from apecache.heads.head import SeveralHeads
from apecache.heads.stacked import StackedHeads, Streams, structure_of
from apecache.losses.stacked import stacked_info_nce
from apecache.recipes.objective import TILED_FROM
from apecache.train.augment import augment
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.loop import (
    Plan,
    Training,
    draw_epoch,
    end_epoch,
    evaluate_untrained,
    is_done,
    train_epoch,
    update_weights,
)

FLOAT_BYTES = 4
STATES = 5
"""Numbers kept for each weight: itself, its gradient, two moments, the best one so far."""
PASSES = 3
"""Numbers kept for each input and output of a layer: forward, backward, and what lies between."""


def split_members(members: Sequence[Training], plans: Sequence[Plan], most: int, max_bytes: int) -> list[list[int]]:
    """Members that can train together, at most `most` of them and within `max_bytes`, by their places; those that
    cannot be stacked stand alone. A single member may need more than `max_bytes`."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for place, (member, plan) in enumerate(zip(members, plans, strict=True)):
        groups[stack_key(member, plan) or place].append(place)
    parts: list[list[int]] = []
    for places in groups.values():
        logits, each = member_bytes(members[places[0]])
        count = max(1, min(most, (max_bytes - logits) // each))
        parts.extend(_in_parts(places, count))
    return sorted(parts)


def _in_parts(places: list[int], size: int) -> Iterator[list[int]]:
    return (places[begin : begin + size] for begin in range(0, len(places), size))


def stack_key(member: Training, plan: Plan) -> Hashable | None:
    """Equal for members that can train together; None for one that trains alone."""
    recipe, structures = member.recipe, (structure_of(member.model.image), structure_of(member.model.text))
    if member.optimiser is None or None in structures:
        return None
    mixes = recipe.augmentation.mixup > 0
    return structures, plan, recipe.schedule.batch_size, recipe.loss.captions, mixes, member.epoch, member.step


def member_bytes(member: Training) -> tuple[int, int]:
    """Bytes of the logits of a batch, which one member needs at a time, and of everything else of each member."""
    batch, captions = member.recipe.schedule.batch_size, member.recipe.loss.captions
    weights = sum(parameter.numel() for parameter in member.model.parameters())
    widths = [
        _width(head) * rows for head, rows in ((member.model.image, batch), (member.model.text, batch * captions))
    ]
    logits = PASSES * min(batch * batch * captions, TILED_FROM)
    return logits * FLOAT_BYTES, (STATES * weights + PASSES * sum(widths)) * FLOAT_BYTES


def _width(head: nn.Module) -> int:
    return sum(m.in_features + m.out_features for m in head.modules() if isinstance(m, nn.Linear))


class Population:
    """Members (at least two, of one `stack_key`) at the same step, and the stack of their heads. `streams`: their
    random states, in the same order; `failures`: why a member is no longer among the `present` ones."""

    def __init__(self, members: Sequence[Training], streams: Streams, plan: Plan) -> None:
        self.members, self.streams, self.plan = list(members), streams, plan
        self.present = list(range(len(members)))
        self.failures: dict[int, str] = {}
        self.heads = self._stack()

    def _stack(self) -> tuple[StackedHeads, StackedHeads]:
        models = [self.members[i].model for i in self.present]
        numbers = self.streams.of(self.present)
        return StackedHeads([m.image for m in models], numbers), StackedHeads([m.text for m in models], numbers)

    def drop(self, places: Sequence[int]) -> None:
        """Take members out; their weights stay as they are."""
        if not set(places) & set(self.present):
            return
        self.release()
        self.present = [i for i in self.present if i not in places]
        if self.present:
            self.heads = self._stack()

    def release(self) -> None:
        """Members own their weights again; the stack is of no use afterwards."""
        for heads in self.heads:
            heads.release()

    def epoch(self, train: FeaturePairs, dev: FeaturePairs) -> None:
        """One epoch, or what is left of the steps, of all that are present; then they are evaluated."""
        begin, done = time.perf_counter(), []
        self.take_steps(train)
        for i in self.present:
            try:
                end_epoch(self.members[i], dev, self.plan, _silent, begin)
            except DataError as error:
                self.failures[i] = str(error)
            if i in self.failures or is_done(self.members[i], self.plan):
                done.append(i)
        self.drop(done)

    def take_steps(self, train: FeaturePairs) -> None:
        """The steps of an epoch of all that are present."""
        plan, members = self.plan, [self.members[i] for i in self.present]
        drawn = [draw_epoch(member, train, plan) for member in members]
        while members[0].in_epoch < plan.per_epoch and members[0].step < plan.n_steps:
            for member, loss in zip(members, self._step(drawn).unbind(), strict=True):
                member.losses.append(loss)
                member.step, member.in_epoch = member.step + 1, member.in_epoch + 1

    def _step(self, drawn: Sequence[Iterator[Batch]]) -> Tensor:
        """float [k]: losses of one step."""
        members = [self.members[i] for i in self.present]
        for member in members:
            assert member.optimiser is not None
            member.optimiser.zero_grad(set_to_none=True)
        parts = [self._add_gradients(members, drawn) for _ in range(self.plan.accumulate)]
        for heads in self.heads:
            heads.share_gradients()
        for member in members:
            update_weights(member, self.plan)
        return torch.stack(parts).sum(0)

    def _add_gradients(self, members: Sequence[Training], drawn: Sequence[Iterator[Batch]]) -> Tensor:
        batches = [self._next(i, next(part)) for i, part in zip(self.present, drawn, strict=True)]
        image = self.heads[0](torch.stack([batch.image for batch in batches]))
        text = self.heads[1](torch.stack([batch.text for batch in batches]))
        if all(_is_plain(member, batch) for member, batch in zip(members, batches, strict=True)):
            scale = torch.stack([member.model.temperature.scale() for member in members])
            losses = stacked_info_nce(image, text, scale) / self.plan.accumulate
            losses.sum().backward()
            return losses.detach()
        return self._one_by_one(members, batches, image, text)

    def _next(self, member: int, batch: Batch) -> Batch:
        training = self.members[member]
        with self.streams.use(member):
            return augment(batch, training.recipe.augmentation, training.model.image, training.model.text)

    def _one_by_one(self, members: Sequence[Training], batches: Sequence[Batch], image: Tensor, text: Tensor) -> Tensor:
        """Any loss, a member after the other, so that the logits of one are in memory at a time."""
        sides = [[row.detach().requires_grad_(side.requires_grad) for row in side.unbind()] for side in (image, text)]
        losses = []
        for member, batch, *pair in zip(members, batches, *sides, strict=True):
            loss = member.model.loss_of(batch, *pair, member.step) / self.plan.accumulate
            loss.backward()
            losses.append(loss.detach())
        ends = [(end, rows) for end, rows in zip((image, text), sides, strict=True) if end.requires_grad]
        gradients = [torch.stack([row.grad for row in rows if row.grad is not None]) for _, rows in ends]
        torch.autograd.backward([end for end, _ in ends], gradients)
        return torch.stack(losses)


def _is_plain(member: Training, batch: Batch) -> bool:
    """Whether the stacked loss is this member's."""
    loss, several = member.recipe.loss, isinstance(member.model.image, SeveralHeads)
    small = len(batch.image) * len(batch.text) <= TILED_FROM
    return loss.kind == "infonce" and not loss.structure and batch.groups is None and small and not several


def train_together(
    members: Sequence[Training],
    streams: Streams,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: Plan,
    n_epochs: int,
    save: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Train members of one `stack_key` up to epoch `n_epochs`; a single one in the ordinary way. `save` is called after
    every epoch. Returns why some could not go on, by their places: their losses are not finite."""
    with torch.random.fork_rng(devices=[train.place] if train.place.type == "cuda" else []):
        for member in members:
            if not member.history:
                evaluate_untrained(member, dev, plan, _silent)
        if len(members) == 1:
            return _train_alone(members[0], streams, train, dev, plan, n_epochs, save)
        population = Population(members, streams, plan)
        population.drop([i for i, member in enumerate(members) if is_done(member, plan)])
        while population.present and members[population.present[0]].epoch < n_epochs:
            population.epoch(train, dev)
            save()
        population.release()
    return population.failures


def _train_alone(
    member: Training,
    streams: Streams,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: Plan,
    n_epochs: int,
    save: Callable[[], None],
) -> dict[int, str]:
    while member.epoch < n_epochs and not is_done(member, plan):
        try:
            with streams.use(0):
                train_epoch(member, train, dev, plan, _silent, lambda _: None)
        except DataError as error:
            return {0: str(error)}
        save()
    return {}


def _silent(_: dict[str, Any]) -> None:
    pass
