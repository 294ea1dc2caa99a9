"""The tiled losses against the plain ones, the plain ones against their definitions, in double
precision."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apecache.losses.contrastive import Groups, grouped_info_nce, info_nce, sigmoid_loss
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(n: int, m: int, dim: int = 5, seed: int = 0, scale: float = 9.0) -> Inputs:
    """Unit vectors [n, dim] and [m, dim], a scale and a bias, all wanting gradients."""
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(k, dim, generator=generator, dtype=torch.float64) for k in (n, m))
    scalars = torch.tensor(scale, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    return tuple(
        x.requires_grad_()
        for x in (F.normalize(image, dim=-1), F.normalize(text, dim=-1), *scalars)
    )  # type: ignore[return-value]


GROUPS = {
    "one each": Groups(image=torch.arange(6), text=torch.arange(6)),
    "five captions": Groups(image=torch.arange(3), text=torch.arange(3).repeat_interleave(5)),
    "equal images": Groups(image=torch.tensor([7, 2, 7, 5]), text=torch.tensor([5, 7, 2, 2, 7])),
    "all one": Groups(
        image=torch.zeros(3, dtype=torch.int64),
        text=torch.zeros(4, dtype=torch.int64),
    ),
}


def grouped_by_definition(image: Tensor, text: Tensor, scale: Tensor, groups: Groups) -> Tensor:
    """Term by term, with nothing but exp and log."""
    total = torch.zeros((), dtype=image.dtype)
    sides = ((image, text, groups.image, groups.text), (text, image, groups.text, groups.image))
    for queries, candidates, own, others in sides:
        for i in range(len(queries)):
            positives = [j for j in range(len(candidates)) if others[j] == own[i]]
            negatives = [j for j in range(len(candidates)) if others[j] != own[i]]
            below = sum(
                ((scale * queries[i] @ candidates[j]).exp() for j in negatives),
                torch.zeros(()),
            )
            for j in positives:
                above = (scale * queries[i] @ candidates[j]).exp()
                total = total - (above / (above + below)).log() / (len(positives) * len(queries))
    return total / 2


def sigmoid_by_definition(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    groups: Groups,
) -> Tensor:
    total = torch.zeros((), dtype=image.dtype)
    for i in range(len(image)):
        for j in range(len(text)):
            z = 1 if groups.image[i] == groups.text[j] else -1
            total = total - (1 / (1 + (-z * (scale * image[i] @ text[j] + bias)).exp())).log()
    return total / len(text)


def value_and_gradients(loss: Tensor, given: Inputs) -> list[Tensor]:
    found = torch.autograd.grad(loss, given, allow_unused=True)
    return [
        loss.detach(),
        *(torch.zeros(()) if gradient is None else gradient for gradient in found),
    ]


def assert_same(first: list[Tensor], second: list[Tensor]) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("tile", [1, 2, 3, 100])
@pytest.mark.parametrize("name", GROUPS)
def test_grouped_losses_plain_and_tiled_equal_their_definition_with_gradients(
    name: str,
    tile: int,
) -> None:
    groups = GROUPS[name]
    given = inputs(len(groups.image), len(groups.text))
    image, text, scale, bias = given
    wanted = value_and_gradients(
        grouped_by_definition(image, text=text, scale=scale, groups=groups),
        given,
    )
    assert_same(
        value_and_gradients(grouped_info_nce(image, text=text, scale=scale, groups=groups), given),
        wanted,
    )
    assert_same(
        value_and_gradients(
            tiled_info_nce(image, text=text, scale=scale, groups=groups, tile=tile),
            given,
        ),
        wanted,
    )
    wanted = value_and_gradients(
        sigmoid_by_definition(image, text=text, scale=scale, bias=bias, groups=groups),
        given,
    )
    assert_same(
        value_and_gradients(
            sigmoid_loss(image, text=text, scale=scale, bias=bias, groups=groups),
            given,
        ),
        wanted,
    )
    assert_same(
        value_and_gradients(
            tiled_sigmoid_loss(image, text=text, scale=scale, bias=bias, groups=groups, tile=tile),
            given,
        ),
        wanted,
    )


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 9),
    tile=st.integers(1, 10),
    scale=st.floats(0.1, 100),
    seed=st.integers(0, 2**31),
)
def test_without_groups_row_belongs_to_row(n: int, tile: int, scale: float, seed: int) -> None:
    given = inputs(n, n, seed=seed, scale=scale)
    image, text, scaled, bias = given
    wanted = value_and_gradients(info_nce(image, text, scaled), given)
    assert_same(value_and_gradients(tiled_info_nce(image, text, scaled, tile=tile), given), wanted)
    rows = torch.arange(n)
    assert_same(
        value_and_gradients(
            grouped_info_nce(image, text=text, scale=scaled, groups=Groups(image=rows, text=rows)),
            given,
        ),
        wanted,
    )
    wanted = value_and_gradients(sigmoid_loss(image, text=text, scale=scaled, bias=bias), given)
    assert_same(
        value_and_gradients(
            tiled_sigmoid_loss(image, text=text, scale=scaled, bias=bias, tile=tile),
            given,
        ),
        wanted,
    )


@pytest.mark.parametrize("groups", [None, GROUPS["equal images"]], ids=["rows", "groups"])
@pytest.mark.parametrize("loss", [tiled_info_nce, tiled_sigmoid_loss])
def test_tiled_gradients_are_those_of_finite_differences(
    loss: Callable[..., Tensor],
    groups: Groups | None,
) -> None:
    given = inputs(4, 4 if groups is None else 5, dim=3)
    wanted = given[:3] if loss is tiled_info_nce else given
    assert torch.autograd.gradcheck(lambda *tensors: loss(*tensors, groups, 3), wanted)


@pytest.mark.parametrize("loss", [tiled_info_nce, tiled_sigmoid_loss])
def test_a_factor_before_the_loss_reaches_all_gradients(loss: Callable[..., Tensor]) -> None:
    given = inputs(4, 4)
    wanted = given[:3] if loss is tiled_info_nce else given
    plain = torch.autograd.grad(loss(*wanted), wanted)
    tripled = torch.autograd.grad(3 * loss(*wanted), wanted)
    for a, b in zip(plain, tripled, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("scale", [1e-3, 100.0, 1e4])
def test_extreme_scales_stay_finite_and_equal(scale: float) -> None:
    given = inputs(6, 6, scale=scale)
    image, text, scaled, _ = given
    single = tuple(x.detach().float().requires_grad_() for x in given)
    wanted = value_and_gradients(info_nce(image, text, scaled), given)
    found = value_and_gradients(tiled_info_nce(*single[:3], tile=4), single)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-3, atol=1e-4 * scale, check_dtype=False)
        assert torch.isfinite(a).all()
    assert torch.isfinite(tiled_sigmoid_loss(*single, tile=4))


def test_a_fixed_scale_gets_no_gradient_and_costs_none() -> None:
    image, text, _, _ = inputs(5, 5)
    tiled_info_nce(image, text, 14.3, tile=2).backward()
    kept = image.grad
    image.grad = None
    info_nce(image, text, 14.3).backward()
    torch.testing.assert_close(image.grad, kept)


def test_captions_of_one_image_do_not_push_each_other_away() -> None:
    """The captions of an image get no gradient from one another: only from other images."""
    image, text, scale, _ = inputs(1, 4)
    loss = grouped_info_nce(
        image,
        text=text,
        scale=scale,
        groups=Groups(image=torch.zeros(1), text=torch.zeros(4)),
    )
    tiled = tiled_info_nce(
        image,
        text=text,
        scale=scale,
        groups=Groups(image=torch.zeros(1), text=torch.zeros(4)),
    )
    assert float(loss.detach()) == float(tiled.detach()) == 0


def test_positives_are_all_pairs_of_equal_group() -> None:
    groups = GROUPS["equal images"]
    rows, columns = groups.positives()
    wanted = [
        (i, j) for i, a in enumerate(groups.image) for j, b in enumerate(groups.text) if a == b
    ]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == wanted


def test_the_tiled_loss_keeps_no_logits_for_the_backward_pass() -> None:
    n = 600
    image, text = (F.normalize(torch.randn(n, 4), dim=-1).requires_grad_() for _ in range(2))
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t,
        lambda t: t,
    ):
        info_nce(image, text, 10.0)
        plain = sum(saved)
        saved[:] = []
        tiled_info_nce(image, text, 10.0, tile=64)
    assert plain > n * n
    assert sum(saved) < 30 * n
