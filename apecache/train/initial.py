"""Make the model that a fit begins with: random weights, or a closed form.

The settings of a closed form are chosen on dev.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from apecache.device import kept_generators
from apecache.errors import DataError, RecipeError
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
from apecache.heads.pooled import N_COMPLEMENTS, Canonical, Dictionary, GatedUnit, PooledHead
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs
from apecache.train.model import AlignmentModel, build_model, evaluate_model

BLOCK_IMAGES = 4096
"""Images, with their texts, whose moments are added at once."""
NO_VARIANCE = 1e-12
"""Sum of the variances of standardized features up to which they are taken to be all equal."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Hold a closed form."""

    settings: dict[str, Json]
    """What was chosen of the section `closed_form`; empty if nothing is open."""
    text: AffineMap
    image: AffineMap | None = None
    """None: images stay as they are."""
    correlations: Tensor | None = None
    """[rank], the canonical correlations to some power, by which normalized vectors are weighted;
    None: the maps hold all weights."""


def initial_model(
    recipe: Recipe,
    train: FeaturePairs,
    dev: FeaturePairs,
    seed: int,
) -> tuple[AlignmentModel, Json]:
    """Return the model before training, and the chosen settings of a closed form.

    The settings are empty where the recipe leaves no choice.

    Raises:
        RecipeError: The heads cannot begin with this closed form, or do not suit the features.
        DataError: A closed form, and the features of a side are all equal.
    """
    match recipe.init:
        case "random" | "pretrained":
            return build_model(recipe, train, seed), {}
        case "asif":
            return _asif(recipe, train, seed), {}
    _require_linear(recipe)
    model = build_model(_with_widths(recipe, train), train, seed)
    covariances = _covariances(model, train)
    _require_varied(covariances)
    candidates = list(_candidates(recipe, covariances))
    if len(candidates) == 1:
        only = candidates[0]
        return _filled(model, only), only.settings
    recalls: list[float] = []
    for candidate in candidates:
        report = evaluate_model(_filled(model, candidate), dev)
        recalls.append(report.selection_score)
    # Of equal recalls the first candidate wins, in the order of the settings.
    best = candidates[recalls.index(max(recalls))]
    return _filled(model, best), best.settings


def _require_varied(covariances: Covariances) -> None:
    """Refuse features that are all equal. Raises DataError that names the side."""
    for side, covariance in (("image", covariances.image), ("text", covariances.text)):
        if not float(covariance.diagonal().sum()) > NO_VARIANCE:
            raise DataError(
                f"the {side} features of the training pairs are all equal; a closed form needs "
                "pairs that differ"
            )


def _candidates(recipe: Recipe, c: Covariances) -> Iterator[Candidate]:
    """Yield the closed form with every combination of its settings.

    Raises:
        RecipeError: CCA gives fewer dimensions than a head has.
    """
    spec = recipe.closed_form
    match recipe.init:
        case "procrustes":
            yield Candidate(settings={}, text=procrustes_map(c))
        case "ridge":
            for ridge in spec.ridge:
                yield Candidate(settings={"ridge": ridge}, text=ridge_map(c, ridge))
        case _:
            n_complements = _n_complements(recipe)
            dims = (recipe.image.dim, recipe.text.dim)
            widths = {dim - n_complements for dim in dims if dim is not None}
            max_rank = min(len(c.image), len(c.text))
            if any(width > max_rank for width in widths):
                raise RecipeError(
                    f"recipe {recipe.name}: cca gives at most {max_rank} dimensions; dim is "
                    f"{max(widths)}"
                )
            ranks = sorted(widths or {min(rank, max_rank) for rank in spec.rank})
            for ridge in spec.ridge:
                maps = canonical_maps(c, ridge)
                for rank, power in product(ranks, spec.power):
                    settings = {"ridge": ridge, "rank": rank, "power": power}
                    # Canonical heads are weighted after they are normalized.
                    image_map, text_map = maps.weighted(rank, 0.0 if n_complements else power)
                    weights = maps.correlations[:rank].clamp_min(0) ** power
                    yield Candidate(
                        settings=settings,
                        image=image_map,
                        text=text_map,
                        correlations=weights if n_complements else None,
                    )


def _n_complements(recipe: Recipe) -> int:
    """Return the values that heads have beside those of their directions."""
    return N_COMPLEMENTS if recipe.text.kind == "canonical" else 0


def _covariances(model: AlignmentModel, train: FeaturePairs) -> Covariances:
    """Compute the covariances of the features as the heads' bodies see them, in one pass."""
    moments = PairMoments()
    owners = train.image_of_text
    model.eval()
    for begin in range(0, len(train), BLOCK_IMAGES):
        end = min(begin + BLOCK_IMAGES, len(train))
        # The texts of a block of images stand one after another.
        texts = slice(int(train.first_text[begin]), int(train.first_text[end]))
        image = _standardized(model.image, train.image[begin:end], train.place)
        text = _standardized(model.text, train.text[texts], train.place)
        # Rows of images within the block.
        block_owners = (owners[texts] - begin).to(train.place)
        moments.add(image, text, block_owners)
    return moments.covariances()


@torch.no_grad()
def _standardized(head: Head, features: Tensor, device: torch.device) -> Tensor:
    """Return standardized features, float32 [n, in_dim]; of several views their mean."""
    standardized = head.standardized(features.to(device))
    return standardized.mean(1) if standardized.ndim == 3 else standardized


@torch.no_grad()
def _filled(model: AlignmentModel, candidate: Candidate) -> AlignmentModel:
    """Return a model with the maps of a candidate in its heads, resized to the maps."""
    image = _with_map(model.image, candidate.image)
    text = _with_map(model.text, candidate.text)
    if candidate.correlations is not None:
        _set_weights(image, candidate.correlations, side=0)
        _set_weights(text, candidate.correlations, side=1)
    return AlignmentModel(
        image,
        text=text,
        temperature=model.temperature,
        loss=model.loss,
    )


def _set_weights(head: Head, correlations: Tensor, side: int) -> None:
    """Set the weights of a canonical head. `side` 0: images, 1: texts."""
    assert isinstance(head.body, Canonical)
    # Both sides are multiplied, so each takes the square root of the weight.
    head.body.weights.copy_(correlations.sqrt())
    head.body.complement.zero_()
    head.body.complement[side] = 1.0


def _with_map(head: Head, affine: AffineMap | None) -> Head:
    """Return the head with a map in it; the head itself without a map."""
    if affine is None:
        return head
    n_complements = N_COMPLEMENTS if head.spec.kind == "canonical" else 0
    return _fill(_resized(head, len(affine.weight) + n_complements), affine)


def _resized(head: Head, dim: int) -> Head:
    """Return a head of width `dim` with the same standardization."""
    if head.spec.dim == dim or head.spec.dim is None:
        return head
    spec = head.spec.model_copy(update={"dim": dim})
    with kept_generators():
        resized_head = build_head(spec, head.in_dim, dim).to(head.mean.device)
    # Statistics alone: the body is filled with a map next.
    resized_head.load_state_dict({"mean": head.mean, "deviation": head.deviation}, strict=False)
    return resized_head


def _fill(head: Head, affine: AffineMap) -> Head:
    """Copy a map into a head: into its linear body, or into the skip connection beside a body.

    A body beside a skip connection gives the map's bias alone at first: its last layer is zero. It
    can still learn.
    """
    assert isinstance(head, PooledHead)
    if head.direct is None:
        layer = head.body.linear if isinstance(head.body, Canonical) else head.body
        assert isinstance(layer, nn.Linear)
        layer.weight.copy_(affine.weight)
        layer.bias.copy_(affine.bias)
    else:
        head.direct.weight.copy_(affine.weight)
        last = head.body.last if isinstance(head.body, GatedUnit) else head.body[-1]  # type: ignore[index]
        last.weight.zero_()
        last.bias.copy_(affine.bias)
    return head


def _asif(recipe: Recipe, train: FeaturePairs, seed: int) -> AlignmentModel:
    """Return a model whose heads compare features with all training pairs (ASIF)."""
    # Each dimension is the similarity to one training image, or to its captions.
    size = {"dim": len(train)}
    sides = {
        "image": recipe.image.model_copy(update=size),
        "text": recipe.text.model_copy(update=size),
    }
    model = build_model(recipe.model_copy(update=sides), train, seed)
    image = _standardized(model.image, train.image, train.place)
    text = _standardized(model.text, train.text, train.place)
    entries = dictionary_entries(image, text, train.image_of_text.to(train.place))
    for head, values in zip((model.image, model.text), entries, strict=True):
        assert isinstance(head.body, Dictionary)
        head.body.entries.copy_(values)
    return model


def _with_widths(recipe: Recipe, train: FeaturePairs) -> Recipe:
    """Set a preliminary width for heads whose width is the rank that CCA chooses."""
    if recipe.init != "cca" or recipe.image.dim or recipe.text.dim:
        return recipe
    rank = min(train.image.shape[-1], train.text.shape[-1], max(recipe.closed_form.rank))
    dim = rank + _n_complements(recipe)
    sides = {
        side: getattr(recipe, side).model_copy(update={"dim": dim}) for side in ("image", "text")
    }
    return recipe.model_copy(update=sides)


def _require_linear(recipe: Recipe) -> None:
    """Raise RecipeError unless the heads can hold the maps of the recipe's closed form."""
    linear: dict[str, bool] = {}
    for side, spec in (("image", recipe.image), ("text", recipe.text)):
        linear[side] = spec.kind in ("linear", "canonical") or spec.skip
        if spec.join != "concat":
            raise RecipeError(
                f"recipe {recipe.name}: init {recipe.init} needs {side}.join concat, found "
                f"{spec.join}"
            )
    pooled = recipe.cut == "pooled"
    if recipe.init == "cca" and not (pooled and all(linear.values())):
        raise RecipeError(
            f"recipe {recipe.name}: init cca needs both heads on pooled features, linear or "
            "with skip"
        )
    if recipe.init != "cca" and not (pooled and recipe.image.kind == "identity" and linear["text"]):
        needs = "image.kind identity, and text on pooled features, linear or with skip"
        raise RecipeError(f"recipe {recipe.name}: init {recipe.init} needs {needs}")
