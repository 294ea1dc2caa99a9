"""The model of a fit: which loss it computes, for which features."""

import pytest
import torch
from recipes import SMALL

from apecache.errors import RecipeError
from apecache.losses import registry as module
from apecache.losses.contrastive import Groups, grouped_info_nce, info_nce, sigmoid_loss
from apecache.losses.geometry import structure_divergence
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.model import AlignmentModel, build_model, evaluate_model


def pairs(n: int = 12, tokens: int | None = None) -> FeaturePairs:
    generator = torch.Generator().manual_seed(0)
    shape = (n, 6) if tokens is None else (n, tokens, 6)
    image = torch.randn(shape, generator=generator)
    text = torch.randn(shape, generator=generator)
    return FeaturePairs(image=image, text=text, first_text=torch.arange(n + 1))


def make(*settings: str) -> tuple[AlignmentModel, Recipe]:
    recipe = load_recipe(SMALL, settings)
    return build_model(recipe, pairs(), seed=0), recipe


def test_the_loss_of_a_batch_is_the_recipes() -> None:
    data = pairs()
    groups = Groups(image=torch.arange(6), text=torch.arange(6).repeat_interleave(2))
    plain = Batch(image=data.image, text=data.text)
    several = Batch(image=data.image[:6], text=data.text, groups=groups)
    for settings in ([], ["loss.kind=sigmoid", "loss.temperature=0.05", "loss.bias=-3"]):
        model, _ = make(*settings)
        image = model.image(data.image)
        text = model.text(data.text)
        scale = model.temperature.scale()
        if settings:
            assert float(model.temperature.bias.detach()) == -3  # type: ignore[union-attr]
            wanted = (
                sigmoid_loss(image, text=text, scale=scale, bias=-3.0),
                sigmoid_loss(image[:6], text=text, scale=scale, bias=-3.0, groups=groups),
            )
        else:
            wanted = (
                info_nce(image, text, scale),
                grouped_info_nce(image[:6], text=text, scale=scale, groups=groups),
            )
        torch.testing.assert_close((model(plain), model(several)), wanted)


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
def test_a_batch_of_many_logits_is_tiled_and_costs_the_same(
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = make(f"loss.kind={kind}")
    data = pairs()
    batch = Batch(image=data.image, text=data.text)
    plain = model(batch)
    monkeypatch.setattr(module, "TILED_FROM", 100)
    monkeypatch.setattr(module, "info_nce", None)
    monkeypatch.setattr(module, "sigmoid_loss", None)
    torch.testing.assert_close(model(batch), plain)


def test_several_heads_have_a_loss_each() -> None:
    model, _ = make(
        "image={kind='ensemble', parts=[{}, {dim=4}]}",
        "text={kind='ensemble', parts=[{dim=5}, {kind='mlp'}]}",
    )
    data = pairs()
    scale = model.temperature.scale()
    alone = zip(model.image.parts, model.text.parts, strict=True)  # type: ignore[arg-type]
    wanted = torch.stack([info_nce(i(data.image), t(data.text), scale) for i, t in alone]).mean()
    torch.testing.assert_close(model(Batch(image=data.image, text=data.text)), wanted)


def test_the_structure_term_grows_and_is_the_mean_of_both_sides() -> None:
    model, _ = make("loss.structure=4", "loss.structure_warmup=10")
    plain, _ = make()
    data = pairs()
    batch = Batch(image=data.image, text=data.text)
    terms = (
        structure_divergence(data.image, model.image(data.image)),
        structure_divergence(data.text, model.text(data.text)),
    )
    for step, weight in ((0, 0.4), (4, 2.0), (9, 4.0), (1000, 4.0)):
        wanted = plain(batch) + weight * (terms[0] + terms[1]) / 2
        torch.testing.assert_close(model(batch, step), wanted)
        contrastive = model.terms(batch, step).contrastive
        assert contrastive is not None
        assert not contrastive.requires_grad
        torch.testing.assert_close(contrastive, plain(batch).detach())
    assert plain.terms(batch).contrastive is None


def test_heads_on_tokens_need_tokens() -> None:
    recipe = load_recipe("token-anchors")
    with pytest.raises(
        RecipeError,
        match=r"image\.kind anchors needs tokens, but the image features are pooled",
    ):
        build_model(recipe, pairs(), 0)
    model = build_model(recipe, pairs(tokens=3), 0)
    assert evaluate_model(model, pairs(tokens=3)).n_images == 12


def test_views_are_averaged_where_a_model_is_evaluated() -> None:
    model, _ = make()
    data = pairs()
    same = FeaturePairs(
        image=data.image.unsqueeze(1).expand(-1, 4, -1),
        text=data.text,
        first_text=data.first_text,
    )
    assert evaluate_model(model, same) == evaluate_model(model, data)
