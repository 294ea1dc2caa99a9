"""What the loop of a fit asks of towers: gradients of a batch from its rows, and retrieval on
dev."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apecache.data.augment import Views
from apecache.errors import RecipeError
from apecache.losses.contrastive import Groups
from apecache.metrics.retrieval import RetrievalReport, retrieval_report
from apecache.models.dual_encoder import EncoderModel, Side
from apecache.models.shared_encoder import SharedSide
from apecache.recipes.recipe import Recipe
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.grad_cache import backward_in_slices
from apecache.train.live import ImageInputs, Inputs
from apecache.train.loop import Fit
from apecache.train.ranks import Ranks

EVALUATION_BATCH = 64


class EncoderFit(Fit[EncoderModel]):
    """A fit within towers; batches hold rows of the store's table, which `inputs` make pixels,
    tokens or features of.

    With several `ranks` each works on its share of every batch, and of dev.
    """

    def __init__(
        self,
        model: EncoderModel,
        inputs: tuple[Inputs, Inputs],
        recipe: Recipe,
        spec: FitEncoderSpec,
        ranks: Ranks,
    ) -> None:
        super().__init__(model, recipe, spec.seed)
        self.inputs = inputs
        self.spec = spec
        self.ranks = ranks
        self.views = image_views(recipe, spec, inputs)

    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        images = batch.image.tolist()
        texts = batch.text.tolist()
        each = len(texts) // len(images)
        groups = _on(batch.groups, self.device)
        inputs = self._as_seen(self.epoch + 1)

        def encode(part: range) -> tuple[Tensor, Tensor]:
            rows = (images[part.start : part.stop], texts[part.start * each : part.stop * each])
            sides = zip((self.model.image, self.model.text), inputs, rows, strict=True)
            image, text = (self._run(side, source, chosen) for side, source, chosen in sides)
            return image, text

        def loss(image: Tensor, text: Tensor) -> Tensor:
            return self.model.loss(image, text, images, groups, self.step) / accumulate

        with self._attention():
            return backward_in_slices(
                encode,
                loss=loss,
                n=len(images),
                slice_size=self.spec.slice_size,
                ranks=self.ranks,
            )

    def join_gradients(self) -> None:
        self.ranks.add_up([p.grad for p, _ in self.model.rates() if p.grad is not None])

    @torch.no_grad()
    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Retrieval among all images and captions of dev, which are seen as they are."""
        self.model.eval()
        rows = dev.image.tolist(), dev.text.tolist()
        sides = zip((self.model.image, self.model.text), self.inputs, rows, strict=True)
        image, text = (self._embed(side, source, chosen) for side, source, chosen in sides)
        relevance = None if dev.relevance is None else dev.relevance.to(image.device)
        return retrieval_report(
            image,
            text,
            dev.image_of_text.to(image.device),
            relevance=relevance,
        )

    def _run(self, side: Side | SharedSide, source: Inputs, rows: Sequence[int]) -> Tensor:
        with self._autocast():
            return side.outputs(*source.take(rows)).float()

    def _embed(self, side: Side | SharedSide, source: Inputs, rows: Sequence[int]) -> Tensor:
        own = self.ranks.shares(len(rows))[self.ranks.rank]
        batches = [rows[i : min(i + EVALUATION_BATCH, own.stop)] for i in own[::EVALUATION_BATCH]]
        with self._autocast():
            parts = [side(*source.take(batch)).float() for batch in batches]
        return self.ranks.gathered(torch.cat(parts), own.start, len(rows))

    def _as_seen(self, epoch: int) -> tuple[Inputs, Inputs]:
        """By training in this epoch."""
        if self.views is None:
            return self.inputs
        image, text = self.inputs
        assert isinstance(image, ImageInputs)
        return image.augmented(self.views, epoch), text

    def _autocast(self) -> Any:
        if self.spec.autocast == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _attention(self) -> Any:
        """On the CPU torch's fused attention in bfloat16 is slow backwards (2.14: ten times its
        time in float32, which made a step of ViT-S/14 at 56 px 1.5 times as long): there the
        products are made one by one."""
        slow = self.device.type == "cpu" and self.spec.autocast == "bfloat16"
        return sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()


def image_views(
    recipe: Recipe,
    spec: FitEncoderSpec,
    inputs: tuple[Inputs, Inputs],
) -> Views | None:
    """How training sees live images; None: as they are.

    Raises:
        RecipeError: the image side runs from cached tokens, which cannot be distorted.
    """
    wanted = recipe.augmentation.image
    if wanted is None:
        return None
    if not isinstance(inputs[0], ImageInputs):
        raise RecipeError(
            f"recipe {recipe.name}: augmentation.image needs images, not cached tokens of theirs; "
            "name pooled features "
            "with --image-features, so that the tower runs from pixels, or leave it out"
        )
    return Views(
        1,
        seed=spec.seed,
        scale=wanted.scale,
        ratio=wanted.ratio,
        flip=wanted.flip,
        operations=wanted.operations,
        magnitude=wanted.magnitude,
    )


def _on(groups: Groups | None, device: torch.device) -> Groups | None:
    return (
        None
        if groups is None
        else replace(groups, image=groups.image.to(device), text=groups.text.to(device))
    )
