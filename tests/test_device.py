"""Devices by name: with their index, or refused."""

import pytest
import torch

from apecache.device import resolve_device
from apecache.errors import OptionError


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
