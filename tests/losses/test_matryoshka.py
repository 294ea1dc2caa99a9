"""The nested loss is the mean of the losses of the first values, and recipes refuse odd widths."""

import pytest
import torch
import torch.nn.functional as F

from apecache.errors import RecipeError
from apecache.losses.registry import build_temperature, contrast
from apecache.losses.spec import LossSpec
from apecache.recipes.recipe import load_recipe


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_the_loss_is_the_mean_over_widths(kind: str) -> None:
    torch.manual_seed(0)
    image = F.normalize(torch.randn(6, 8), dim=1)
    text = F.normalize(torch.randn(6, 8), dim=1)
    plain = LossSpec(kind=kind)  # type: ignore[arg-type]
    nested = LossSpec(kind=kind, matryoshka=(2, 4))  # type: ignore[arg-type]
    temperature = build_temperature(plain)
    terms = []
    for width in (2, 4, 8):
        short_image = F.normalize(image[:, :width], dim=1)
        short_text = F.normalize(text[:, :width], dim=1)
        terms.append(contrast(short_image, short_text, temperature, None, plain))
    found = contrast(image, text, temperature, None, nested)
    assert found.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["loss.matryoshka=[4,2]"], "widths must rise"),
        (["loss.matryoshka=[0,2]"], "widths must rise"),
        (["image.dim=16", "text.dim=16", "loss.matryoshka=[8,16]"], "not smaller than the width"),
    ],
)
def test_odd_widths_are_refused(settings: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("projection", settings)
