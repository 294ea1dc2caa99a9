"""The model that a fit begins with: random weights, or a closed form whose settings are chosen on
dev."""

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn

from apecache.errors import RecipeError
from apecache.fingerprint import Json
from apecache.heads.build import build_head
from apecache.heads.closed_form import (
    AffineMap,
    Covariances,
    PairMoments,
    canonical_maps,
    dictionary_entries,
    procrustes_map,
    ridge_map,
)
from apecache.heads.head import Head
from apecache.heads.pooled import Dictionary, GatedUnit, PooledHead
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs
from apecache.train.model import AlignmentModel, build_model, evaluate_model

BLOCK_IMAGES = 4096
Candidate = tuple[dict[str, Json], AffineMap | None, AffineMap]
"""What was chosen, and the maps of image (None: identity) and text."""


def initial_model(
    recipe: Recipe,
    train: FeaturePairs,
    dev: FeaturePairs,
    seed: int,
) -> tuple[AlignmentModel, Json]:
    """The model before training, and what of `closed_form` was chosen (empty where there is no
    choice).

    Raises:
        RecipeError: the heads cannot begin with this closed form, or do not suit the features.
    """
    match recipe.init:
        case "random":
            return build_model(recipe, train, seed), {}
        case "asif":
            return _asif(recipe, train, seed), {}
    _require_linear(recipe)
    model = build_model(_with_widths(recipe, train), train, seed)
    candidates = list(_candidates(recipe, _covariances(model, train)))
    if len(candidates) == 1:
        return _filled(model, candidates[0]), candidates[0][0]
    recalls = [
        evaluate_model(_filled(model, candidate), dev).mean_recall for candidate in candidates
    ]
    best = candidates[recalls.index(max(recalls))]
    return _filled(model, best), best[0]


def _candidates(recipe: Recipe, c: Covariances) -> Iterator[Candidate]:
    spec = recipe.closed_form
    match recipe.init:
        case "procrustes":
            yield {}, None, procrustes_map(c)
        case "ridge":
            for ridge in spec.ridge:
                yield {"ridge": ridge}, None, ridge_map(c, ridge)
        case _:
            widths = {d for d in (recipe.image.dim, recipe.text.dim) if d is not None}
            most = min(len(c.image), len(c.text))
            if any(width > most for width in widths):
                raise RecipeError(
                    f"recipe {recipe.name}: cca gives at most {most} dimensions; dim is "
                    f"{max(widths)}"
                )
            ranks = sorted(widths or {min(rank, most) for rank in spec.rank})
            for ridge in spec.ridge:
                maps = canonical_maps(c, ridge)
                for rank, power in product(ranks, spec.power):
                    yield (
                        {"ridge": ridge, "rank": rank, "power": power},
                        *maps.weighted(rank, power),
                    )


def _covariances(model: AlignmentModel, train: FeaturePairs) -> Covariances:
    """Of the features as the heads' bodies see them; one pass."""
    moments = PairMoments()
    owners = train.image_of_text
    model.eval()
    for begin in range(0, len(train), BLOCK_IMAGES):
        end = min(begin + BLOCK_IMAGES, len(train))
        texts = slice(int(train.first_text[begin]), int(train.first_text[end]))
        image = _standardised(model.image, train.image[begin:end], train.place)
        text = _standardised(model.text, train.text[texts], train.place)
        moments.add(image, text, owners[texts].to(train.place) - begin)
    return moments.covariances()


@torch.no_grad()
def _standardised(head: Head, features: Tensor, device: torch.device) -> Tensor:
    """float32 [n, in_dim]; several views by their mean."""
    x = head.standardised(features.to(device))
    return x.mean(1) if x.ndim == 3 else x


@torch.no_grad()
def _filled(model: AlignmentModel, candidate: Candidate) -> AlignmentModel:
    """A model with the maps in its heads, as wide as they are."""
    _, *maps = candidate
    heads = [
        head if affine is None else _fill(_resized(head, len(affine.weight)), affine)
        for head, affine in zip((model.image, model.text), maps, strict=True)
    ]
    return AlignmentModel(heads[0], text=heads[1], temperature=model.temperature, loss=model.loss)


def _resized(head: Head, dim: int) -> Head:
    if head.spec.dim == dim or head.spec.dim is None:
        return head
    with torch.random.fork_rng(devices=[]):
        made = build_head(head.spec.model_copy(update={"dim": dim}), head.in_dim, dim).to(
            head.mean.device
        )
    made.load_state_dict({"mean": head.mean, "deviation": head.deviation}, strict=False)
    return made


def _fill(head: Head, affine: AffineMap) -> Head:
    """The map as the linear body, or as the direct way beside a body that is silent at first (and
    can still learn: only its last layer is zero)."""
    assert isinstance(head, PooledHead)
    if head.direct is None:
        assert isinstance(head.body, nn.Linear)
        head.body.weight.copy_(affine.weight)
        head.body.bias.copy_(affine.bias)
    else:
        head.direct.weight.copy_(affine.weight)
        last = head.body.last if isinstance(head.body, GatedUnit) else head.body[-1]  # type: ignore[index]
        last.weight.zero_()
        last.bias.copy_(affine.bias)
    return head


def _asif(recipe: Recipe, train: FeaturePairs, seed: int) -> AlignmentModel:
    size = {"dim": len(train)}
    sides = {
        "image": recipe.image.model_copy(update=size),
        "text": recipe.text.model_copy(update=size),
    }
    model = build_model(recipe.model_copy(update=sides), train, seed)
    image = _standardised(model.image, train.image, train.place)
    text = _standardised(model.text, train.text, train.place)
    entries = dictionary_entries(image, text, train.image_of_text.to(train.place))
    for head, values in zip((model.image, model.text), entries, strict=True):
        assert isinstance(head.body, Dictionary)
        head.body.entries.copy_(values)
    return model


def _with_widths(recipe: Recipe, train: FeaturePairs) -> Recipe:
    """A width for heads that get theirs from the choice of a rank."""
    if recipe.init != "cca" or recipe.image.dim or recipe.text.dim:
        return recipe
    dim = min(train.image.shape[-1], train.text.shape[-1], max(recipe.closed_form.rank))
    sides = {
        side: getattr(recipe, side).model_copy(update={"dim": dim}) for side in ("image", "text")
    }
    return recipe.model_copy(update=sides)


def _require_linear(recipe: Recipe) -> None:
    linear = {
        side: getattr(recipe, side).kind == "linear" or getattr(recipe, side).skip
        for side in ("image", "text")
    }
    pooled = recipe.cut == "pooled"
    if recipe.init == "cca" and not (pooled and all(linear.values())):
        raise RecipeError(
            f"recipe {recipe.name}: init cca needs both heads on pooled features, linear or "
            "with skip"
        )
    if recipe.init != "cca" and not (pooled and recipe.image.kind == "identity" and linear["text"]):
        needs = "image.kind identity, and text on pooled features, linear or with skip"
        raise RecipeError(f"recipe {recipe.name}: init {recipe.init} needs {needs}")
