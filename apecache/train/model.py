"""Define the model of a fit of heads: two heads, a temperature, and the loss of a batch."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from apecache.device import seeded_generators
from apecache.errors import RecipeError
from apecache.heads.build import build_heads
from apecache.heads.head import EnsembleHead, Head, embed, mask_of
from apecache.heads.tokens import masked_mean
from apecache.losses.contrastive import Temperature
from apecache.losses.registry import (
    LossTerms,
    build_temperature,
    contrast,
    structure_term,
    structure_weight,
)
from apecache.losses.spec import LossSpec
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.selection import dev_report
from apecache.recipes.recipe import Recipe
from apecache.train.batches import Batch, FeaturePairs


class AlignmentModel(nn.Module):
    """Embed both sides by a head each, and compute the loss with a temperature."""

    def __init__(
        self,
        image: Head,
        text: Head,
        temperature: Temperature,
        loss: LossSpec | None = None,
    ) -> None:
        super().__init__()
        self.image = image
        self.text = text
        self.temperature = temperature
        self.loss = loss or LossSpec()

    def forward(self, batch: Batch, step: int = 0) -> Tensor:
        """Compute the loss of a batch, a scalar.

        Several heads side by side have a loss each. The result is their mean.

        Args:
            batch: Features of images and texts.
            step: Step of the fit, from 0.
        """
        return self.terms(batch, step).total

    def terms(self, batch: Batch, step: int = 0) -> LossTerms:
        """Compute the loss of a batch and its contrastive term. See `forward`."""
        image = self.image(batch.image, batch.image_mask)
        text = self.text(batch.text, batch.text_mask)
        return self._terms_of(batch, image=image, text=text, step=step)

    def loss_of(self, batch: Batch, image: Tensor, text: Tensor, step: int = 0) -> Tensor:
        """Compute the loss of a batch from its embeddings. See `forward`."""
        return self._terms_of(batch, image=image, text=text, step=step).total

    def _terms_of(self, batch: Batch, image: Tensor, text: Tensor, step: int) -> LossTerms:
        """Compute the terms of a batch from its embeddings. See `terms`."""
        widths = self.image.widths if isinstance(self.image, EnsembleHead) else ()
        contrastive = contrast(
            image,
            text=text,
            temperature=self.temperature,
            groups=batch.groups,
            spec=self.loss,
            widths=widths,
        )
        if not self.loss.structure:
            return LossTerms(total=contrastive)
        weight = structure_weight(step, self.loss)
        total = contrastive + weight * self._structure(batch, image, text)
        return LossTerms(total=total, contrastive=contrastive.detach())

    def _structure(self, batch: Batch, image: Tensor, text: Tensor) -> Tensor:
        """Compute the structure term, the mean over both sides."""
        sides = ((batch.image, batch.image_mask, image), (batch.text, batch.text_mask, text))
        terms: list[Tensor] = []
        for features, mask, embeddings in sides:
            pooled = features.float()
            # The term compares one vector of each row: tokens are pooled by their mean.
            if features.ndim != 2:
                pooled = masked_mean(pooled, mask)
            terms.append(structure_term(pooled, embeddings, self.loss))
        return torch.stack(terms).mean()

    def rates(self) -> list[tuple[nn.Parameter, float]]:
        """Return what trains, each parameter with its factor of the learning rate."""
        return [(p, 1.0) for p in self.parameters() if p.requires_grad]

    def undecayed(self) -> list[nn.Parameter]:
        """Return none: what is not decayed are embeddings of towers."""
        return []

    def clamp(self) -> None:
        """Bring the temperature back into its bounds."""
        self.temperature.clamp()

    def kept_state(self) -> dict[str, Tensor]:
        """Return all tensors that a fit keeps."""
        return self.state_dict()

    def load_kept(self, tensors: Mapping[str, Tensor]) -> None:
        """Load what `kept_state` returned."""
        self.load_state_dict(dict(tensors))


def build_model(recipe: Recipe, train: FeaturePairs, seed: int) -> AlignmentModel:
    """Build the recipe's model for these features, with standardization fitted.

    Args:
        recipe: Recipe of heads and loss.
        train: Training pairs, which give widths and standardization.
        seed: Seed of the weights.

    Raises:
        RecipeError: The widths do not work, or the features are not of the kind that the heads
            need.
    """
    for side, spec, features in (
        ("image", recipe.image, train.image),
        ("text", recipe.text, train.text),
    ):
        if spec.cut == "tokens" and features.ndim != 3:
            raise RecipeError(
                f"recipe {recipe.name}: {side}.kind {spec.kind} needs tokens, but the {side} "
                "features are pooled; extract tokens, or choose a recipe on pooled features "
                "(apecache recipes)"
            )
    # Built on the CPU: a seed gives the same weights on every device.
    with seeded_generators(seed):
        try:
            image, text = build_heads(
                recipe.image.with_widths(train.image_widths),
                text=recipe.text.with_widths(train.text_widths),
                image_dim=train.image.shape[-1],
                text_dim=train.text.shape[-1],
            )
        except ValueError as error:
            raise RecipeError(f"recipe {recipe.name}: {error}") from None
    image = image.to(train.place)
    text = text.to(train.place)
    image.fit_statistics(train.image, _whole_mask(train.image, train.image_lengths))
    text.fit_statistics(train.text, _whole_mask(train.text, train.text_lengths))
    return AlignmentModel(
        image,
        text=text,
        temperature=build_temperature(recipe.loss).to(train.place),
        loss=recipe.loss,
    )


def _whole_mask(features: Tensor, lengths: Tensor | None) -> Tensor | None:
    """Return the mask of valid tokens of all rows; None without lengths."""
    return None if lengths is None else mask_of(lengths, features)


def evaluate_model(model: AlignmentModel, pairs: FeaturePairs) -> RetrievalReport:
    """Measure retrieval among `pairs`, without dropout."""
    image = embed(model.image, pairs.image, pairs.image_lengths)
    text = embed(model.text, pairs.text, pairs.text_lengths)
    return dev_report(
        image,
        text,
        pairs.image_of_text.to(image.device),
        relevance=pairs.relevance,
    )
