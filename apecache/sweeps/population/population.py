"""Many small heads trained together: every member ends where a fit of its own would, up to
rounding.

Members of one structure, batch size and number of steps share batched products; all else is a
member's own and goes through the code of the ordinary trainer: optimiser, schedule, temperature,
augmentation, batches, evaluation. A member that is done, dropped or no longer finite leaves the
stack, and the stack shrinks. (The bias of a layer before a batch norm changes nothing and has no
gradient but rounding, which Adam amplifies: it alone may end elsewhere.)
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from apecache.errors import DataError, RunError
from apecache.fingerprint import Json
from apecache.heads.head import SeveralHeads
from apecache.losses.objective import TILED_FROM
from apecache.sweeps.population.slab import Slab
from apecache.sweeps.population.stacked_heads import Streams, structure_of
from apecache.train.batches import FeaturePairs
from apecache.train.loop import (
    Plan,
    Training,
    end_epoch,
    evaluate_untrained,
    is_done,
    require_finite,
    train_epoch,
)

FLOAT_BYTES = 4
STATES = 5
"""Numbers kept for each weight: itself, its gradient, two moments, the best one so far."""
PASSES = 3
"""Numbers kept for each input and output of a layer: forward, backward, and what lies between."""
SLAB_BYTES = 2**20
"""Of activations that stay in the caches of a processor."""
STANDARDISED_BYTES = 2**29
"""Features that need more than this are standardised batch by batch."""


def split_members(
    members: Sequence[Training],
    plans: Sequence[Plan],
    most: int,
    max_bytes: int,
) -> list[list[int]]:
    """Members that can train together, at most `most` of them and within `max_bytes`, by their
    places; those that cannot be stacked stand alone. A single member may need more than
    `max_bytes`."""
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
    recipe = member.recipe
    structures = (structure_of(member.model.image), structure_of(member.model.text))
    if member.optimiser is None or None in structures:
        return None
    mixes = recipe.augmentation.mixup > 0
    return (
        structures,
        plan,
        recipe.schedule.batch_size,
        recipe.loss.captions,
        mixes,
        member.epoch,
        member.step,
    )


def member_bytes(member: Training) -> tuple[int, int]:
    """Bytes of the logits of a batch, which one member needs at a time, and of everything else of
    each member."""
    weights = sum(parameter.numel() for parameter in member.model.parameters())
    logits, activations = activation_counts(member)
    return PASSES * min(logits, TILED_FROM) * FLOAT_BYTES, (
        STATES * weights + PASSES * activations
    ) * FLOAT_BYTES


def activation_counts(member: Training) -> tuple[int, int]:
    """Numbers in the logits of a batch, and in the inputs and outputs of all layers."""
    batch = member.recipe.schedule.batch_size
    captions = member.recipe.loss.captions
    image = _width(member.model.image)
    text = _width(member.model.text)
    return batch * batch * captions, batch * (image + captions * text)


def _width(head: nn.Module) -> int:
    return sum(m.in_features + m.out_features for m in head.modules() if isinstance(m, nn.Linear))


class Population:
    """Members (at least two, of one `stack_key`) at the same step. `streams`: their random states,
    in the same order; `failures`: why a member is no longer among the `present` ones.

    On a CPU members take turns in slabs whose activations stay in its caches, an epoch each; on
    other devices all of them make one slab."""

    def __init__(self, members: Sequence[Training], streams: Streams, plan: Plan) -> None:
        self.members = list(members)
        self.streams = streams
        self.plan = plan
        self.failures: dict[int, str] = {}
        places = list(range(len(members)))
        size = len(members) if streams.device.type != "cpu" else slab_size(members[0])
        self.slabs = [self._slab(part) for part in _in_parts(places, size)]
        self._fed: tuple[FeaturePairs, FeaturePairs] | None = None

    def _slab(self, places: list[int]) -> Slab:
        return Slab(
            places,
            members=[self.members[i] for i in places],
            streams=self.streams.of(places),
            plan=self.plan,
        )

    @property
    def present(self) -> list[int]:
        return [place for slab in self.slabs for place in slab.places]

    def drop(self, places: Sequence[int]) -> None:
        """Take members out; their weights stay as they are."""
        slabs = []
        for slab in self.slabs:
            left = [place for place in slab.places if place not in places]
            if len(left) < len(slab.places):
                slab.release()
            if left:
                slabs.append(slab if len(left) == len(slab.places) else self._slab(left))
        self.slabs = slabs

    def release(self) -> None:
        """Members own their weights again; the population is of no use afterwards."""
        self.drop(self.present)

    def epoch(self, train: FeaturePairs, dev: FeaturePairs) -> None:
        """One epoch, or what is left of the steps, of all that are present; then they are
        evaluated."""
        begin = time.perf_counter()
        done = []
        self.take_steps(train)
        for i in self.present:
            try:
                end_epoch(self.members[i], dev=dev, plan=self.plan, log=_silent, begin=begin)
            except DataError as error:
                self.failures[i] = str(error)
            if i in self.failures or is_done(self.members[i], self.plan):
                done.append(i)
        self.drop(done)

    def take_steps(self, train: FeaturePairs) -> None:
        """The steps of an epoch of all that are present."""
        fed = self._standardised(train)
        for slab in self.slabs:
            slab.take_steps(fed, fed is not train)

    def _standardised(self, train: FeaturePairs) -> FeaturePairs:
        """The features as all heads see them, made once; or as they are, if heads or augmentation
        need that."""
        if self._fed is None or self._fed[0] is not train:
            alike = _see_alike(self.members) and _fits(train)
            self._fed = train, _standardise(train, self.members[0]) if alike else train
        return self._fed[1]


def slab_size(member: Training) -> int:
    _, each = activation_counts(member)
    return max(1, SLAB_BYTES // (FLOAT_BYTES * each))


def _see_alike(members: Sequence[Training]) -> bool:
    """Whether all heads see features in the same way, and nothing else looks at them."""
    for member in members:
        spec = member.recipe.augmentation
        if (
            spec.noise
            or spec.mixup
            or member.recipe.loss.structure
            or isinstance(member.model.image, SeveralHeads)
        ):
            return False
    models = [member.model for member in members]
    first = members[0].model
    sides = [
        (getattr(model, side), getattr(first, side))
        for model in models
        for side in ("image", "text")
    ]
    return all(
        torch.equal(a.mean, b.mean) and torch.equal(a.deviation, b.deviation) for a, b in sides
    )


def _fits(train: FeaturePairs) -> bool:
    there = train.image.device == train.text.device == train.place
    return there and FLOAT_BYTES * (train.image.numel() + train.text.numel()) <= STANDARDISED_BYTES


@torch.no_grad()
def _standardise(train: FeaturePairs, member: Training) -> FeaturePairs:
    image, text = (
        features.float().sub(head.mean).div_(head.deviation)
        for features, head in ((train.image, member.model.image), (train.text, member.model.text))
    )
    return replace(train, image=image, text=text)


def train_together(
    members: Sequence[Training],
    streams: Streams,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: Plan,
    n_epochs: int,
    save: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Train members of one `stack_key` up to epoch `n_epochs`; a single one in the ordinary way.
    `save` is called after every epoch. Returns why some could not go on, by their places: their
    losses are not finite (those of an earlier call, too, that were restored)."""
    with torch.random.fork_rng(devices=[train.place] if train.place.type == "cuda" else []):
        for member in members:
            if not member.history:
                evaluate_untrained(member, dev=dev, plan=plan, log=_silent)
        if len(members) == 1:
            return _train_alone(
                members[0],
                streams=streams,
                train=train,
                dev=dev,
                plan=plan,
                n_epochs=n_epochs,
                save=save,
            )
        population = Population(members, streams, plan)
        population.failures.update(_failed(members))
        population.drop(
            [i for i, m in enumerate(members) if is_done(m, plan) or i in population.failures]
        )
        while population.present and members[population.present[0]].epoch < n_epochs:
            population.epoch(train, dev)
            save()
        population.release()
    return population.failures


def _failed(members: Sequence[Training]) -> dict[int, str]:
    found = {}
    for i, member in enumerate(members):
        try:
            require_finite(member)
        except DataError as error:
            found[i] = str(error)
    return found


def members_state(
    members: Sequence[Training],
    streams: Streams,
) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Tensors and state of all members, as one checkpoint holds them; also in the midst of
    `train_together`."""
    tensors = {}
    states = []
    for i, member in enumerate(members):
        with streams.alone(i):
            tensors.update(
                {f"{i}/{name}": tensor.clone() for name, tensor in member.tensors().items()}
            )
        states.append(member.state())
    return tensors, {"members": states}


def restore_members(
    members: Sequence[Training],
    streams: Streams,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Json],
) -> None:
    """Raises RunError unless these are the tensors of such members."""
    parts: list[dict[str, Tensor]] = [{} for _ in members]
    try:
        for key, tensor in tensors.items():
            place, _, name = key.partition("/")
            parts[int(place)][name] = tensor
        states = [state["members"][i] for i in range(len(members))]
    except (LookupError, TypeError, ValueError):
        raise RunError("the checkpoint is not one of these members; choose another --out") from None
    for i, member in enumerate(members):
        with streams.alone(i):
            member.restore(parts[i], states[i])


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
                train_epoch(
                    member,
                    train=train,
                    dev=dev,
                    plan=plan,
                    log=_silent,
                    save=lambda _: None,
                )
        except DataError as error:
            return {0: str(error)}
        save()
    return {}


def _silent(_: dict[str, Any]) -> None:
    pass
