"""Two heads, a temperature, and the loss of a batch of pairs."""

import torch
from torch import Tensor, nn

from apecache.errors import RecipeError
from apecache.evaluate.retrieval import RetrievalReport, retrieval_report
from apecache.heads.build import build_heads
from apecache.heads.head import Head, SeveralHeads, embed, mask_of
from apecache.heads.tokens import masked_mean
from apecache.losses.contrastive import Groups, Temperature, grouped_info_nce, info_nce, sigmoid_loss
from apecache.losses.geometry import structure_divergence
from apecache.losses.tiled import tiled_info_nce, tiled_sigmoid_loss
from apecache.recipes.recipe import LossSpec, Recipe
from apecache.train.batches import Batch, FeaturePairs

TILED_FROM = 2**22
"""Logits of a batch above which the tiled losses are used: 2,048 images with one caption each."""


class AlignmentModel(nn.Module):
    """Two heads and a temperature."""

    def __init__(self, image: Head, text: Head, temperature: Temperature, loss: LossSpec | None = None) -> None:
        super().__init__()
        self.image, self.text, self.temperature = image, text, temperature
        self.loss = loss or LossSpec()

    def forward(self, batch: Batch, step: int = 0) -> Tensor:
        """Loss of a batch (a scalar) at the 0-based `step`. Several heads side by side have a loss each; this is the
        mean of theirs."""
        image, text = self.image(batch.image, batch.image_mask), self.text(batch.text, batch.text_mask)
        return self.loss_of(batch, image, text, step)

    def loss_of(self, batch: Batch, image: Tensor, text: Tensor, step: int = 0) -> Tensor:
        """The same, of a batch's embeddings."""
        if isinstance(self.image, SeveralHeads):
            widths = self.image.widths
            pairs = zip(image.split(widths, dim=-1), text.split(widths, dim=-1), strict=True)
            length = len(widths) ** 0.5
            total = torch.stack([self._contrast(i * length, t * length, batch.groups) for i, t in pairs]).mean()
        else:
            total = self._contrast(image, text, batch.groups)
        if self.loss.structure:
            total = total + self._structure_weight(step) * self._structure(batch, image, text)
        return total

    def _contrast(self, image: Tensor, text: Tensor, groups: Groups | None) -> Tensor:
        scale = self.temperature.scale()
        tiled = len(image) * len(text) > TILED_FROM
        match self.loss.kind:
            case "infonce" if tiled:
                return tiled_info_nce(image, text, scale, groups)
            case "infonce":
                return info_nce(image, text, scale) if groups is None else grouped_info_nce(image, text, scale, groups)
            case "sigmoid":
                bias = self.temperature.bias if self.temperature.bias is not None else self.loss.bias
                return (tiled_sigmoid_loss if tiled else sigmoid_loss)(image, text, scale, bias, groups)

    def _structure(self, batch: Batch, image: Tensor, text: Tensor) -> Tensor:
        """Mean over both sides; tokens are taken by their mean."""
        spec = self.loss
        sides = ((batch.image, batch.image_mask, image), (batch.text, batch.text_mask, text))
        terms = [
            structure_divergence(
                before.float() if before.ndim == 2 else masked_mean(before.float(), mask),
                after,
                spec.structure_temperature,
                spec.structure_divergence,
            )
            for before, mask, after in sides
        ]
        return torch.stack(terms).mean()

    def _structure_weight(self, step: int) -> float:
        grown = min(1.0, (step + 1) / self.loss.structure_warmup) if self.loss.structure_warmup else 1.0
        return self.loss.structure * grown


def build_model(recipe: Recipe, train: FeaturePairs, seed: int) -> AlignmentModel:
    """The recipe's model for these features, weights by seed, standardisation fitted.

    Raises:
        RecipeError: the widths do not work, or the features are not of the kind that the heads need.
    """
    for what, spec, features in (("image", recipe.image, train.image), ("text", recipe.text, train.text)):
        if spec.cut == "tokens" and features.ndim != 3:
            raise RecipeError(
                f"recipe {recipe.name}: {what}.kind {spec.kind} needs tokens, but the {what} features are pooled; "
                "extract tokens, or choose a recipe on pooled features (apecache recipes)"
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            image, text = build_heads(recipe.image, recipe.text, train.image.shape[-1], train.text.shape[-1])
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name}: {error}") from None
    image, text = image.to(train.place), text.to(train.place)
    image.fit_statistics(train.image, _whole_mask(train.image, train.image_lengths))
    text.fit_statistics(train.text, _whole_mask(train.text, train.text_lengths))
    return AlignmentModel(image, text, build_temperature(recipe.loss).to(train.place), recipe.loss)


def build_temperature(loss: LossSpec) -> Temperature:
    bias = loss.bias if loss.kind == "sigmoid" else None
    return Temperature(loss.temperature, loss.min_temperature, loss.max_temperature, loss.learnable, bias)


def _whole_mask(features: Tensor, lengths: Tensor | None) -> Tensor | None:
    return None if lengths is None else mask_of(lengths, features)


def evaluate_model(model: AlignmentModel, pairs: FeaturePairs) -> RetrievalReport:
    """Retrieval among `pairs`, dropout off."""
    image = embed(model.image, pairs.image, pairs.image_lengths)
    text = embed(model.text, pairs.text, pairs.text_lengths)
    return retrieval_report(image, text, pairs.image_of_text.to(image.device))
