"""Random numbers: every seed reaches the generators that are drawn from, and no others."""

from collections.abc import Callable

import pytest
import torch
from populations import TRAIN, make

from apecache.device import (
    CPU,
    free_memory_bytes,
    generator_states,
    indexed_device,
    is_accelerator,
    kept_generators,
    seeded_generators,
    synchronize,
)
from apecache.sweeps.population.stacked_heads import MemberGenerators
from apecache.train.loop import seeded


def test_a_seed_gives_the_numbers_of_torch_and_the_caller_keeps_its_own() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    before = torch.get_rng_state()
    with seeded_generators(3):
        drawn = torch.rand(4)
    assert torch.equal(drawn, expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_caller_keeps_its_numbers_when_there_is_an_error() -> None:
    before = torch.get_rng_state()

    def draw_and_fail() -> None:
        with kept_generators():
            torch.rand(4)
            raise ValueError("made up")

    with pytest.raises(ValueError, match="made up"):
        draw_and_fail()
    assert torch.equal(torch.get_rng_state(), before)


def _enter_seeded() -> None:
    with seeded(1, CPU):
        torch.rand(1)


@pytest.mark.parametrize(
    "act",
    [
        _enter_seeded,
        lambda: make((), 0, TRAIN),
        lambda: MemberGenerators.seeded([1, 2], CPU),
    ],
    ids=["a fit", "initial weights", "members"],
)
def test_generators_of_other_devices_are_left_alone(
    act: Callable[[], object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`torch.manual_seed` seeds every device there is, which `fork_rng` does not restore."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    act()
    assert seeds == []


def test_the_cpu_is_no_accelerator() -> None:
    assert not is_accelerator(CPU)
    assert indexed_device(CPU) == torch.empty(0).device
    assert len(generator_states(CPU)) == 1
    assert free_memory_bytes(CPU) is None
    synchronize(CPU)
