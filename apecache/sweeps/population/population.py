"""Many small heads trained together: every member ends where a fit alone would, up to rounding.

Members of one structure, batch size and number of steps share batched products. Everything else is
done member by member with the code of the ordinary trainer: optimizer, schedule, temperature,
augmentation, batches, evaluation. A member that is done, dropped or no longer finite leaves the
stack, and the stack shrinks.

Two exceptions: the bias of a layer before a batch norm and that of the keys of an attention change
no output. Their gradients are rounding alone, which Adam amplifies: they may end elsewhere.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from apecache.device import is_accelerator, kept_generators
from apecache.errors import DataError, RunError
from apecache.fingerprint import Json
from apecache.heads.head import EnsembleHead, Head
from apecache.losses.registry import TILED_FROM
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.sweeps.population.member_group import MemberGroup
from apecache.sweeps.population.stacked_heads import structure_of
from apecache.train.batches import FeaturePairs
from apecache.train.fit import HeadFit, StepCount
from apecache.train.loop import end_epoch, evaluate_untrained, is_done, require_finite, train_epoch
from apecache.train.resident import activation_numbers, layer_widths

FLOAT_BYTES = 4
STATES = 5
"""Numbers kept for each weight: itself, its gradient, two moments, the best value so far."""
PASSES = 3
"""Numbers kept for each input and output of a layer: forward, backward, and intermediate ones."""
SLAB_BYTES = 2**20
"""Bytes of activations that stay in the caches of a processor."""
STANDARDIZED_BYTES = 2**29
"""Features that need more bytes than this are standardized batch by batch."""


def split_members(
    members: Sequence[HeadFit],
    plans: Sequence[StepCount],
    train: FeaturePairs,
    most: int,
    max_bytes: int,
) -> list[list[int]]:
    """Split members into lists that can train together.

    Args:
        members: The members; those that cannot be stacked get a list each.
        plans: The plan of each member.
        train: The features to train on.
        most: The largest number of members that train together.
        max_bytes: The memory of members that train together. A single member may need more.

    Returns:
        Positions of members, each list in ascending order.
    """
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for position, (member, plan) in enumerate(zip(members, plans, strict=True)):
        groups[stack_key(member, plan) or position].append(position)
    slices: list[list[int]] = []
    for positions in groups.values():
        logit_bytes, bytes_per_member = member_bytes(members[positions[0]], train)
        n_fitting = (max_bytes - logit_bytes) // bytes_per_member
        if is_accelerator(members[positions[0]].device):
            # Accelerators compute the logits of all members at once.
            n_fitting = max_bytes // (logit_bytes + bytes_per_member)
        # At least one: a member that exceeds the memory trains alone.
        n_members = max(1, min(most, n_fitting))
        slices.extend(_in_slices(positions, n_members))
    return sorted(slices)


def _in_slices(positions: list[int], size: int) -> Iterator[list[int]]:
    for begin in range(0, len(positions), size):
        yield positions[begin : begin + size]


def stack_key(member: HeadFit, plan: StepCount) -> Hashable | None:
    """Return a key that is equal for members that can train together; None for one that cannot."""
    recipe = member.recipe
    structures = (structure_of(member.model.image), structure_of(member.model.text))
    if member.optimizer is None or None in structures:
        return None
    mixes = recipe.augmentation.mixup > 0
    # Epoch and step are part of the key: a stack takes one step for all of its members.
    return (
        structures,
        plan,
        recipe.schedule.batch_size,
        recipe.loss.captions,
        recipe.loss.temperature_parameter,
        recipe.schedule.epoch,
        mixes,
        recipe.loss.learnable,
        recipe.loss.kind,
        member.epoch,
        member.step,
    )


def member_bytes(member: HeadFit, train: FeaturePairs) -> tuple[int, int]:
    """Estimate memory: of the logits of a batch, and of everything else of each member.

    On a CPU one member at a time needs logits, so that they count once for a population.
    """
    recipe = member.recipe
    batch = recipe.schedule.batch_size
    weights = sum(parameter.numel() for parameter in member.model.parameters())
    # Larger logits are computed in tiles.
    n_logits = PASSES * min(batch * batch * recipe.loss.captions, TILED_FROM)
    image = _row_numbers(member.model.image, train.image)
    text = _row_numbers(member.model.text, train.text)
    activations = batch * (image + recipe.loss.captions * text)
    n_others = STATES * weights + PASSES * activations
    return n_logits * FLOAT_BYTES, n_others * FLOAT_BYTES


def _row_numbers(head: Head, features: Tensor) -> int:
    """Estimate the numbers of one row on its way through a head."""
    if head.spec.cut == "tokens":
        return activation_numbers(head, head.spec, tuple(features.shape[1:]))
    return layer_widths(head)


class Population:
    """Train members together, at the same step.

    On a CPU members take turns, an epoch each, in groups whose activations stay in its caches. On
    accelerators all of them make one group, and dropout draws one mask tensor for all members: a
    member with dropout then ends elsewhere than a fit alone.

    Args:
        members: At least two, of one `stack_key`.
        streams: The random states of the members, in the same order.
        plan: The plan of every member.
        few_launches: See `MemberGroup`; None: on accelerators.

    Attributes:
        failures: Why a member is no longer among the `present` ones, by its position.
    """

    def __init__(
        self,
        members: Sequence[HeadFit],
        streams: MemberGenerators,
        plan: StepCount,
        few_launches: bool | None = None,
    ) -> None:
        self.members = list(members)
        self.streams = streams
        self.plan = plan
        self.failures: dict[int, str] = {}
        self.few_launches = few_launches
        if few_launches is None:
            self.few_launches = is_accelerator(streams.device)
        positions = list(range(len(members)))
        size = len(members) if self.few_launches else slab_size(members[0])
        self.groups = [
            self._group(group_positions) for group_positions in _in_slices(positions, size)
        ]
        self._fed: tuple[FeaturePairs, FeaturePairs] | None = None

    def _group(self, positions: list[int]) -> MemberGroup:
        return MemberGroup(
            positions,
            members=[self.members[i] for i in positions],
            streams=self.streams.of(positions),
            plan=self.plan,
            few_launches=bool(self.few_launches),
        )

    @property
    def present(self) -> list[int]:
        """Positions of the members that still train."""
        return [position for group in self.groups for position in group.places]

    def drop(self, places: Sequence[int]) -> None:
        """Take members out by their positions; their weights stay unchanged."""
        groups = []
        for group in self.groups:
            remaining = [position for position in group.places if position not in places]
            if len(remaining) == len(group.places):
                if remaining:
                    groups.append(group)
                continue
            # Members get weights outside the old stack before those that stay are stacked anew.
            group.release()
            if remaining:
                groups.append(self._group(remaining))
        self.groups = groups

    def release(self) -> None:
        """Give members weights outside the stacks. Call it last."""
        self.drop(self.present)

    def epoch(self, train: FeaturePairs, dev: FeaturePairs) -> None:
        """Take the rest of an epoch's steps with all present members, then evaluate them."""
        begin = time.perf_counter()
        ended = []
        self.take_steps(train)
        for i in self.present:
            member = self.members[i]
            try:
                end_epoch(member, dev=dev, plan=self.plan, log=_silent, begin=begin)
            except DataError as error:
                self.failures[i] = str(error)
            if i in self.failures or is_done(member, self.plan):
                ended.append(i)
        self.drop(ended)

    def take_steps(self, train: FeaturePairs) -> None:
        """Take the steps of an epoch with all present members."""
        fed = self._standardized(train)
        for group in self.groups:
            group.take_steps(fed, fed is not train)

    def _standardized(self, train: FeaturePairs) -> FeaturePairs:
        """Return the features as all heads see them, made once.

        Returns `train` itself where heads see them differently, augmentation needs raw features, or
        memory is short.
        """
        if self._fed is None or self._fed[0] is not train:
            is_shared = _see_alike(self.members) and _fits(train)
            fed = _standardize(train, self.members[0]) if is_shared else train
            self._fed = (train, fed)
        return self._fed[1]


def slab_size(member: HeadFit) -> int:
    """Return how many such members have activations that stay in a processor's caches."""
    recipe = member.recipe
    heads = (member.model.image, member.model.text)
    # The tokens of a batch of one member fill the caches.
    if any(head.spec.cut == "tokens" for head in heads):
        return 1
    image, text = map(layer_widths, heads)
    n_activations = recipe.schedule.batch_size * (image + recipe.loss.captions * text)
    return max(1, SLAB_BYTES // (FLOAT_BYTES * n_activations))


def _see_alike(members: Sequence[HeadFit]) -> bool:
    """Return whether all heads standardize features alike, and nothing else looks at them."""
    return not any(_needs_raw_features(member) for member in members) and all(
        _same_statistics(member, members[0]) for member in members
    )


def _needs_raw_features(member: HeadFit) -> bool:
    spec = member.recipe.augmentation
    return bool(
        spec.noise
        or spec.mixup
        or member.recipe.loss.structure
        or isinstance(member.model.image, EnsembleHead)
    )


def _same_statistics(member: HeadFit, other: HeadFit) -> bool:
    for side in ("image", "text"):
        head = getattr(member.model, side)
        other_head = getattr(other.model, side)
        if not torch.equal(head.mean, other_head.mean):
            return False
        if not torch.equal(head.deviation, other_head.deviation):
            return False
    return True


def _fits(train: FeaturePairs) -> bool:
    """Return whether the features lie on the training device and a float32 copy is small."""
    is_resident = train.image.device == train.text.device == train.place
    n_numbers = train.image.numel() + train.text.numel()
    return is_resident and FLOAT_BYTES * n_numbers <= STANDARDIZED_BYTES


@torch.no_grad()
def _standardize(train: FeaturePairs, member: HeadFit) -> FeaturePairs:
    image_head = member.model.image
    text_head = member.model.text
    image = train.image.float().sub(image_head.mean).div_(image_head.deviation)
    text = train.text.float().sub(text_head.mean).div_(text_head.deviation)
    return replace(train, image=image, text=text)


def train_together(
    members: Sequence[HeadFit],
    streams: MemberGenerators,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    n_epochs: int,
    save: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Train members up to an epoch; a single one with the ordinary trainer.

    Args:
        members: Fits of one `stack_key`.
        streams: The random states of the members, in the same order.
        train: The features to train on.
        dev: The features to evaluate on after every epoch.
        plan: The plan of every member.
        n_epochs: The epoch to stop at.
        save: Called after every epoch.

    Returns:
        The errors of members whose losses are not finite, by their positions. Members that were
        restored from an earlier call count too.
    """
    # Members draw from torch's own generators: the caller finds them as they were.
    with kept_generators(train.place):
        for member in members:
            # Members that were restored have been evaluated untrained.
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
        ended = []
        for i, member in enumerate(members):
            if is_done(member, plan) or i in population.failures:
                ended.append(i)
        population.drop(ended)
        while population.present and members[population.present[0]].epoch < n_epochs:
            population.epoch(train, dev)
            save()
        population.release()
    return population.failures


def _failed(members: Sequence[HeadFit]) -> dict[int, str]:
    errors = {}
    for i, member in enumerate(members):
        try:
            require_finite(member)
        except DataError as error:
            errors[i] = str(error)
    return errors


def members_state(
    members: Sequence[HeadFit],
    streams: MemberGenerators,
) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Return the tensors and state of all members for one checkpoint.

    It may be called between two epochs of `train_together`. Tensors are named
    `position/name of the member's tensor`.
    """
    tensors = {}
    states = []
    for i, member in enumerate(members):
        with streams.alone(i):
            for name, tensor in member.tensors().items():
                # A copy: weights may be views of a stack, whose memory all members share.
                tensors[f"{i}/{name}"] = tensor.clone()
        states.append(member.state())
    return tensors, {"members": states}


def restore_members(
    members: Sequence[HeadFit],
    streams: MemberGenerators,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Json],
) -> None:
    """Restore members from what `members_state` returned.

    Raises:
        RunError: The tensors or the state are not of such members.
    """
    tensors_of_members: list[dict[str, Tensor]] = [{} for _ in members]
    try:
        for key, tensor in tensors.items():
            position, _, name = key.partition("/")
            tensors_of_members[int(position)][name] = tensor
        states = [state["members"][i] for i in range(len(members))]
    except (LookupError, TypeError, ValueError):
        raise RunError("the checkpoint is not one of these members; choose another --out") from None
    for i, member in enumerate(members):
        with streams.alone(i):
            member.restore(tensors_of_members[i], states[i])


def _train_alone(
    member: HeadFit,
    streams: MemberGenerators,
    train: FeaturePairs,
    dev: FeaturePairs,
    plan: StepCount,
    n_epochs: int,
    save: Callable[[], None],
) -> dict[int, str]:
    """Train a single member as `fit_head` does, with its own random states."""
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
