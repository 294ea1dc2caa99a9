"""Keep the random states of torch's own generators for each member of a population."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from apecache.device import (
    generator_states,
    kept_generators,
    seeded_generators,
    set_generator_states,
)


class MemberGenerators:
    """Hold random states of torch's own generators, one for each member.

    Args:
        states: For each member what `generator_states` returned.
        device: The device that members train on.
    """

    def __init__(self, states: list[list[Tensor]], device: torch.device) -> None:
        self.states = states
        self.device = device

    @staticmethod
    def seeded(seeds: Sequence[int], device: torch.device) -> "MemberGenerators":
        """Make a state from each seed; the generators of the caller stay unchanged."""
        streams = MemberGenerators([], device)
        for seed in seeds:
            with seeded_generators(seed, device):
                streams.states.append(generator_states(device))
        return streams

    def of(self, members: Sequence[int]) -> "MemberGenerators":
        """Return the states of some members. They are shared with these streams, not copied."""
        states = [self.states[i] for i in members]
        return MemberGenerators(states, self.device)

    @contextmanager
    def use(self, member: int) -> Iterator[None]:
        """Let torch draw this member's numbers; the state that torch had before is lost."""
        state = self.states[member]
        set_generator_states(state, self.device)
        yield
        # In place: streams made by `of` share this list.
        state[:] = generator_states(self.device)

    @contextmanager
    def alone(self, member: int) -> Iterator[None]:
        """Do what `use` does, and restore the state that torch had before."""
        with kept_generators(self.device), self.use(member):
            yield
