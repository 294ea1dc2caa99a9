"""The stacked loss against the ordinary one, model by model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apecache.losses.contrastive import Groups, info_nce, sigmoid_loss
from apecache.losses.geometry import structure_divergence
from apecache.sweeps.population.stacked_losses import (
    batched_info_nce,
    batched_sigmoid,
    batched_structure,
    stacked_info_nce,
    stacked_sigmoid,
)


@pytest.mark.parametrize("loss", [stacked_info_nce, batched_info_nce])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_losses_and_gradients_are_those_of_info_nce(loss: Any, rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(rows)
    image, text = (
        F.normalize(
            torch.randn(3, rows, 8, generator=generator, dtype=torch.float64),
            dim=-1,
        ).requires_grad_()
        for _ in range(2)
    )
    log_scales = (scale * torch.tensor([1.0, 0.5, 0.9], dtype=torch.float64)).log()
    scales = log_scales.requires_grad_().exp()
    expected = torch.stack([info_nce(i, t, s) for i, t, s in zip(image, text, scales, strict=True)])
    gradients = torch.autograd.grad(expected.sum(), (image, text, log_scales))
    found = loss(image.detach(), text.detach(), scales.detach())
    torch.testing.assert_close(found, (expected.detach(), gradients))


@pytest.mark.parametrize("loss", [stacked_sigmoid, batched_sigmoid])
@pytest.mark.parametrize("captions", [1, 2])
def test_losses_and_gradients_are_those_of_the_sigmoid_loss(loss: Any, captions: int) -> None:
    generator = torch.Generator().manual_seed(captions)

    def embeddings(rows: int) -> torch.Tensor:
        values = torch.randn(3, rows, 8, generator=generator, dtype=torch.float64)
        return F.normalize(values, dim=-1).requires_grad_()

    image = embeddings(9)
    text = embeddings(9 * captions)
    log_scales = torch.tensor([10.0, 3.0, 50.0], dtype=torch.float64).log().requires_grad_()
    biases = torch.tensor([-10.0, 0.0, -2.0], dtype=torch.float64, requires_grad=True)
    groups = [
        Groups(
            image=torch.randint(4, (9,), generator=generator),
            text=torch.randint(4, (9 * captions,), generator=generator),
        )
        for _ in range(3)
    ]
    pieces = zip(image, text, log_scales.exp(), biases, groups, strict=True)
    expected = torch.stack([sigmoid_loss(*piece) for piece in pieces])
    by_image, by_text, by_scale, by_bias = torch.autograd.grad(
        expected.sum(), (image, text, log_scales, biases)
    )
    same = torch.stack([g.image.unsqueeze(1) == g.text.unsqueeze(0) for g in groups])
    found = loss(image.detach(), text.detach(), log_scales.exp().detach(), biases.detach(), same)
    torch.testing.assert_close(found, (expected.detach(), (by_image, by_text, by_scale), by_bias))


@pytest.mark.parametrize("divergence", ["jensen-shannon", "as-coded"])
def test_losses_and_gradients_are_those_of_the_structure_term(divergence: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def rows(dim: int) -> torch.Tensor:
        return torch.randn(3, 7, dim, generator=generator, dtype=torch.float64)

    befores = (rows(6).float().double(), rows(4).float().double())
    afters = (rows(5).requires_grad_(), rows(5).requires_grad_())
    weights = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64)
    temperatures = torch.tensor([0.05, 0.1, 0.2], dtype=torch.float64)
    terms = []
    for before, after in zip(befores, afters, strict=True):
        pieces = zip(before.float(), after, temperatures, strict=True)
        terms.append(
            torch.stack([structure_divergence(*piece, kind=divergence) for piece in pieces])
        )
    expected = weights * torch.stack(terms).mean(0)
    gradients = torch.autograd.grad(expected.sum(), afters)
    sides = [(before, after.detach()) for before, after in zip(befores, afters, strict=True)]
    losses, found = batched_structure(sides, weights, temperatures, divergence)
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(list(found), list(gradients))
