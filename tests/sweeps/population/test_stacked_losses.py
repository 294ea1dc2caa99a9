"""The stacked loss against the ordinary one, model by model."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from apecache.losses.contrastive import info_nce
from apecache.sweeps.population.stacked_losses import batched_info_nce, stacked_info_nce


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
