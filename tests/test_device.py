"""Devices by name, and random numbers: every seed reaches the generators that are drawn from."""

from collections.abc import Callable

import pytest
import torch
from populations import TRAIN, make

from apecache.device import (
    CPU,
    free_memory_bytes,
    generator_states,
    is_accelerator,
    kept_generators,
    resolve_device,
    seeded_generators,
    synchronize,
)
from apecache.errors import OptionError
from apecache.sweeps.population.member_generators import MemberGenerators
from apecache.train.fit import seeded


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
    assert resolve_device("cpu") == torch.empty(0).device
    assert len(generator_states(CPU)) == 1
    assert free_memory_bytes(CPU) is None
    synchronize(CPU)


def test_auto_is_cuda_if_there_is_any() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["auto", "cpu"])
def test_a_device_equals_that_of_tensors_on_it(name: str) -> None:
    device = resolve_device(name)
    assert device == torch.ones(1).to(device).device


def test_the_index_is_that_of_the_allocated_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what torch says of a tensor on `cuda`."""
    tensor = torch.ones(1, device=torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = list[str]()

    def empty(*_: object, device: str) -> torch.Tensor:
        asked.append(device)
        return tensor

    monkeypatch.setattr(torch, "empty", empty)
    assert resolve_device("auto") == tensor.device
    assert asked == ["cuda"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_has_an_index() -> None:
    assert resolve_device("cuda") == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.parametrize("name", ["cuda:99", "abacus"])
def test_a_device_that_cannot_be_used_is_refused_with_a_remedy(name: str) -> None:
    message = rf"device '{name}' cannot be used \(.*\); try --device auto or cpu$"
    with pytest.raises(OptionError, match=message):
        resolve_device(name)
