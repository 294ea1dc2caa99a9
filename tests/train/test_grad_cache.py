"""Slices: the gradients of the whole batch, whatever the slices, the dropout and the side that is
cached."""

from collections.abc import Sequence

import pytest
import torch
from small_towers import pictures, small_bert, small_vit
from torch import Tensor, nn

from apecache.encoders.tower import Tower
from apecache.errors import OptionError
from apecache.losses.contrastive import Groups
from apecache.losses.registry import build_temperature, contrast
from apecache.losses.spec import LossSpec
from apecache.train.grad_cache import backward_in_slices, slices_of

N = 256


class Pair(nn.Module):
    """Two small towers in double precision, and a temperature; keeps what every call returned."""

    def __init__(self, kind: str = "infonce", captions: int = 1, **settings: float) -> None:
        super().__init__()
        self.kind = kind
        self.captions = captions
        self.image: Tower = small_vit(depth=1)
        self.text: Tower = small_bert(num_hidden_layers=1, **settings)
        self.temperature = build_temperature(LossSpec(kind=kind))
        self.double().train()
        self.pixels = pictures(N).double()
        self.calls = list[tuple[Tensor, Tensor]]()
        self.ids = torch.randint(
            5,
            60,
            (N * captions, 6),
            generator=torch.Generator().manual_seed(2),
        )
        own = torch.arange(N)
        self.groups = (
            Groups(image=own, text=own.repeat_interleave(captions)) if captions > 1 else None
        )

    def encode(self, positions: Sequence[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(positions)
        ids = self.ids.view(N, self.captions, -1)[index].flatten(0, 1)
        sides = self.image(self.pixels[index]), self.text(ids, torch.ones_like(ids))
        first, second = (nn.functional.normalize(side, dim=-1) for side in sides)
        self.calls.append((first.detach(), second.detach()))
        return first, second

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return contrast(
            image,
            text=text,
            temperature=self.temperature,
            groups=self.groups,
            spec=LossSpec(kind=self.kind),
        )

    def run(
        self,
        slice_size: int | None,
        lengths: list[int] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.zero_grad()
        value = backward_in_slices(
            self.encode,
            loss=self.loss,
            n=N,
            slice_size=slice_size,
            lengths=lengths,
        )
        return value, {
            name: p.grad.clone() for name, p in self.named_parameters() if p.grad is not None
        }


@pytest.mark.parametrize(
    ("slice_size", "kind", "captions"),
    [
        (16, "infonce", 1),
        (100, "infonce", 2),
        (255, "infonce", 1),
        (16, "sigmoid", 1),
        (100, "sigmoid", 2),
    ],
)
def test_gradients_in_slices_are_those_of_the_whole_batch(
    slice_size: int,
    kind: str,
    captions: int,
) -> None:
    pair = Pair(kind, captions)
    value, whole = pair.run(None)
    again, sliced = pair.run(slice_size)
    torch.testing.assert_close(again, value)
    assert sliced.keys() == whole.keys()
    assert {
        "temperature.log_scale",
        *(["temperature.bias"] if kind == "sigmoid" else []),
    } <= whole.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(sliced[name], gradient, rtol=1e-9, atol=1e-12)


def test_slices_are_no_accumulation() -> None:
    """Accumulating the losses of slices would lose the negatives of the other slices."""
    pair = Pair()
    _, whole = pair.run(None)
    pair.zero_grad()
    for begin in range(0, N, 16):
        (pair.loss(*pair.encode(range(begin, begin + 16))) / 16).backward()
    assert any(
        not torch.allclose(p.grad, whole[n])
        for n, p in pair.named_parameters()
        if p.grad is not None
    )


def test_dropout_draws_the_same_in_both_passes_and_not_in_all_slices() -> None:
    pair = Pair(hidden_dropout_prob=0.3)
    torch.manual_seed(5)
    pair.run(64)
    first = pair.calls[:4]
    second = pair.calls[4:]
    for (_, before), (_, after) in zip(first, second, strict=True):
        assert torch.equal(before, after)
    pair.calls.clear()
    pair.run(64)
    assert not torch.equal(first[0][1], pair.calls[0][1])


def test_a_side_without_gradients_stays_without() -> None:
    pair = Pair()
    pair.image.requires_grad_(False)
    _, whole = pair.run(None)
    _, sliced = pair.run(32)
    assert not any(name.startswith("image.") for name in whole.keys() | sliced.keys())
    for name, gradient in whole.items():
        torch.testing.assert_close(sliced[name], gradient, rtol=1e-9, atol=1e-12)


def test_slices_are_cut_by_length_where_there_are_several() -> None:
    lengths = [9, 3, 7, 5, 1, 8]
    assert slices_of(range(1, 6), 2, lengths) == [[4, 1], [3, 2], [5]]
    assert slices_of(range(1, 6), 2) == [range(1, 3), range(3, 5), range(5, 6)]
    # One slice is padded to the longest of all in any order.
    assert slices_of(range(1, 6), 5, lengths) == slices_of(range(1, 6), None) == [range(1, 6)]


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("slice_size", [37, 128])
def test_dropout_gives_the_same_gradients_whatever_the_slices(slice_size: int, sort: bool) -> None:
    """With two captions of each image; in double precision, so that only rounding is left."""
    lengths = torch.randperm(N, generator=torch.Generator().manual_seed(1)).tolist()
    pair = Pair(captions=2, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    runs = []
    for size in (None, slice_size):
        torch.manual_seed(5)
        runs.append(pair.run(size, lengths if sort else None))
    (value, whole), (again, sliced) = runs
    torch.testing.assert_close(again, value)
    for name, gradient in whole.items():
        torch.testing.assert_close(sliced[name], gradient, rtol=1e-9, atol=1e-12)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_layer_that_draws_in_another_way_is_refused_in_slices_only() -> None:
    pair = Pair()
    pair.image.module.norm_pre = Noisy()
    pair.run(None)
    with pytest.raises(OptionError, match="train without --slice and in one process"):
        pair.run(64)
