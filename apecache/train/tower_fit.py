"""Give the loop of a fit what it needs of towers: gradients of a batch, and retrieval on dev."""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apecache.data.augment import Views
from apecache.errors import RecipeError
from apecache.losses.contrastive import Groups
from apecache.metrics.retrieval import RetrievalReport
from apecache.metrics.selection import dev_report
from apecache.models.dual_encoder import EncoderModel, Side
from apecache.models.shared_encoder import SharedSide
from apecache.recipes.recipe import Recipe
from apecache.train.batches import Batch, FeaturePairs
from apecache.train.compiled import compiled_outputs
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit import Fit
from apecache.train.grad_cache import backward_in_slices, gather_slices, slices_of
from apecache.train.live import ImageInputs, Inputs, TextInputs, TokenInputs
from apecache.train.ranks import Ranks

EVALUATION_BATCH = 64
"""Number of images or texts that are embedded at once on dev."""


class EncoderFit(Fit[EncoderModel]):
    """Fit towers and heads.

    Batches hold rows of the store's table. `inputs` turn rows into pixels, tokens or features.
    With several `ranks` each process works on its share of every batch, and of dev.
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
        self.seen = _as_seen(inputs, image_views(recipe, spec, inputs), spec.compile)
        self.outputs = (model.image.outputs, model.text.outputs)
        self.compiled = self.outputs
        if spec.compile:
            self.compiled = (compiled_outputs(model.image), compiled_outputs(model.text))
        self.next_rows: _Rows | None = None

    def add_gradients(self, batch: Batch, accumulate: int) -> Tensor:
        """Add the gradients of a batch, slice by slice. See `Fit.add_gradients`."""
        rows = _Rows.of(batch)
        groups = _on(batch.groups, self.device)
        # Each of several slices is encoded twice, one pass after the other.
        slices = self._slices(rows)
        upcoming = iter([*slices[1:], *(slices if len(slices) > 1 else [])])
        # The operations of the first step are counted, which those of a compiled model cannot be.
        image_outputs, text_outputs = self.outputs if self.step_flops is None else self.compiled

        def encode(positions: Sequence[int]) -> tuple[Tensor, Tensor]:
            image_inputs, image_rows = self._images(rows, positions)
            pixels = image_inputs.take(image_rows)
            # The next slice is read while this one is computed; after the last one, the next batch.
            following = next(upcoming, None)
            if following is not None:
                self._read(rows, following)
            elif self.next_rows is not None:
                self._read(self.next_rows, self._slices(self.next_rows)[0])
            with self._autocast():
                # The loss is computed in float32, also where the tower computes in bfloat16.
                image = image_outputs(*pixels).float()
                text = text_outputs(*self.seen[1].take(rows.texts_of(positions))).float()
            return image, text

        def loss(image: Tensor, text: Tensor) -> Tensor:
            terms = self.model.terms(
                image,
                text=text,
                rows=rows.images,
                groups=groups,
                step=self.step,
            )
            return self.add_terms(terms, accumulate)

        with self._attention():
            return backward_in_slices(
                encode,
                loss=loss,
                n=len(rows.images),
                slice_size=self.spec.slice_size,
                lengths=self._lengths(rows),
                ranks=self.ranks,
                device=self.device,
            )

    def read_ahead(self, drawn: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches of an epoch, each once the rows of the next one are known."""
        batch = next(drawn, None)
        while batch is not None:
            following = next(drawn, None)
            self.next_rows = None if following is None else _Rows.of(following)
            yield batch
            batch = following

    def _slices(self, rows: "_Rows") -> list[Sequence[int]]:
        """Return the positions of a batch that this process encodes, slice by slice."""
        share = self.ranks.shares(len(rows.images))[self.ranks.rank]
        return slices_of(share, self.spec.slice_size, self._lengths(rows))

    def _lengths(self, rows: "_Rows") -> list[int] | None:
        """Return the length of the longest text of each position; None: all are alike."""
        lengths = self.seen[1].lengths(rows.texts)
        if lengths is None:
            return None
        per_image = len(lengths) // len(rows.images)
        return [max(lengths[row : row + per_image]) for row in range(0, len(lengths), per_image)]

    def _images(self, rows: "_Rows", positions: Sequence[int]) -> tuple[Inputs, list[int]]:
        """Return the image inputs as training sees them, and the rows of these positions."""
        inputs = self.seen[0]
        if isinstance(inputs, ImageInputs):
            # `epoch` counts the epochs that are done; the views are those of the present one.
            captions = rows.texts_of(positions) if self.recipe.schedule.epoch == "pairs" else ()
            inputs = replace(inputs, epoch=self.epoch + 1, captions=captions)
        return inputs, [rows.images[position] for position in positions]

    def _read(self, rows: "_Rows", positions: Sequence[int]) -> None:
        """Begin to read the images of these positions."""
        inputs, image_rows = self._images(rows, positions)
        if isinstance(inputs, ImageInputs):
            inputs.read_ahead(image_rows)

    def join_gradients(self) -> None:
        """Add up the gradients of all processes."""
        parameters = [parameter for parameter, _ in self.model.rates()]
        self.ranks.add_up([p.grad for p in parameters if p.grad is not None])

    @torch.no_grad()
    def evaluate(self, dev: FeaturePairs) -> RetrievalReport:
        """Measure retrieval among all images and captions of dev, without augmentation."""
        image, text = self.embed(dev)
        relevance = None if dev.relevance is None else dev.relevance.to(image.device)
        return dev_report(
            image,
            text,
            dev.image_of_text.to(image.device),
            relevance=relevance,
        )

    @torch.no_grad()
    def embed(self, pairs: FeaturePairs) -> tuple[Tensor, Tensor]:
        """Embed images and texts, [n, dim] and [m, dim], L2-normalized, without augmentation."""
        self.model.eval()
        image_inputs, text_inputs = self.inputs
        image = self._embed(self.model.image, image_inputs, pairs.image.tolist())
        text = self._embed(self.model.text, text_inputs, pairs.text.tolist())
        return image, text

    def _embed(self, side: Side | SharedSide, source: Inputs, rows: Sequence[int]) -> Tensor:
        """Return the embeddings of these rows, [n, dim], each process encoding its share."""
        share = self.ranks.shares(len(rows))[self.ranks.rank]
        batches = slices_of(share, EVALUATION_BATCH, source.lengths(rows))
        embedded_batches: list[Tensor] = []
        for batch, following in zip(batches, [*batches[1:], []], strict=True):
            inputs = source.take([rows[position] for position in batch])
            if isinstance(source, ImageInputs):
                source.read_ahead([rows[position] for position in following])
            with self._autocast():
                embedded_batches.append(side(*inputs).float())
        return gather_slices(
            embedded_batches,
            slices=batches,
            share=share,
            n=len(rows),
            ranks=self.ranks,
        )

    def _autocast(self) -> Any:
        """Return the context in which the towers compute."""
        if not self.spec.uses_bfloat16(self.device):
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _attention(self) -> Any:
        """Return the context in which attention computes."""
        # On the CPU the backward pass of torch's fused attention in bfloat16 is slow (torch 2.14:
        # ten times its time in float32, which made a step of ViT-S/14 at 56 px 1.5 times as long).
        is_slow = self.device.type == "cpu" and self.spec.uses_bfloat16(self.device)
        return sdpa_kernel(SDPBackend.MATH) if is_slow else nullcontext()


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """Hold the rows of the store's table that a batch has."""

    images: list[int]
    texts: list[int]
    """As many for each image, in the order of the images."""

    @staticmethod
    def of(batch: Batch) -> "_Rows":
        return _Rows(images=batch.image.tolist(), texts=batch.text.tolist())

    def texts_of(self, positions: Sequence[int]) -> list[int]:
        """Return the texts of the images at these positions."""
        per_image = len(self.texts) // len(self.images)
        texts: list[int] = []
        for position in positions:
            texts += self.texts[position * per_image : (position + 1) * per_image]
        return texts


def image_views(
    recipe: Recipe,
    spec: FitEncoderSpec,
    inputs: tuple[Inputs, Inputs],
) -> Views | None:
    """Return the views in which training sees images; None: without augmentation.

    Raises:
        RecipeError: The image side runs from cached features, which cannot be distorted.
    """
    augmentation = recipe.augmentation.image
    if augmentation is None:
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
        scale=augmentation.scale,
        ratio=augmentation.ratio,
        flip=augmentation.flip,
        operations=augmentation.operations,
        magnitude=augmentation.magnitude,
        jitter=augmentation.jitter,
    )


def _as_seen(
    inputs: tuple[Inputs, Inputs],
    views: Views | None,
    in_buckets: bool,
) -> tuple[Inputs, Inputs]:
    """Return the inputs as training sees them: with image views, and in lengths of a few kinds."""
    image, text = inputs
    if in_buckets:
        image = _in_buckets(image)
        text = _in_buckets(text)
    if views is not None:
        assert isinstance(image, ImageInputs)
        image = image.augmented(views, epoch=0)
    return image, text


def _in_buckets(inputs: Inputs) -> Inputs:
    """Return inputs whose batches have few shapes, each of which is compiled."""
    if isinstance(inputs, TextInputs | TokenInputs):
        return replace(inputs, in_buckets=True)
    return inputs


def _on(groups: Groups | None, device: torch.device) -> Groups | None:
    """Return the groups on a device."""
    if groups is None:
        return None
    return replace(groups, image=groups.image.to(device), text=groups.text.to(device))
