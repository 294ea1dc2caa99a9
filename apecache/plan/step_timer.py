"""Time a plan's step on this machine: the trainers' own step on random weights, made-up inputs."""

import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from apecache.data.images import decode_image
from apecache.device import resolve_device, seeded_generators, timed_seconds
from apecache.encoders.load import load_preprocess, shape_tower
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import Cut, Tower
from apecache.errors import OptionError
from apecache.models.dual_encoder import Teacher, build_around
from apecache.plan.counting import PlanSpec, example
from apecache.plan.counting_shared import TeacherSizes
from apecache.plan.plan import Cuts, steps_of
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs, batches
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit import Fit, HeadFit, StepCount
from apecache.train.live import CachedInputs, ImageInputs, Inputs, TokenInputs
from apecache.train.loop import take_step
from apecache.train.model import build_model
from apecache.train.ranks import ALONE
from apecache.train.tower_fit import EncoderFit

FIRST_IMAGES = 16
ENOUGH_SECONDS = 0.5
"""After a step that takes so long, larger batches are not run but extrapolated."""
MOST_STEPS = 9
"""Timed calls, at most."""
SAMPLE_SIZE = (500, 375)
SAMPLE_QUALITY = 90
N_SAMPLES = 16
"""Made-up images are JPEGs of the size and quality of common photo data sets."""
ENCODED_IMAGES = 32
"""Images in a timed batch of what is computed once, for the cache."""


@dataclass(kw_only=True)
class StepTimer:
    """Time a recipe on CUDA if there is any, else on the CPU.

    It is an `apecache.plan.plan.PlanTimer`.
    """

    recipe: Recipe
    image: EncoderSpec
    text: EncoderSpec
    spec: PlanSpec
    teacher: Callable[[], TeacherSizes] | None = None
    sample: Path | None = None
    """A folder of images like those that will be trained on; None: made-up images."""
    clock: Callable[[], float] = time.perf_counter
    """Gives seconds. On a machine with other load, count the time of the process instead."""
    _files: list[bytes] = field(default_factory=list)

    def once(self, cuts: Cuts) -> float:
        """Return the seconds of one image with its captions below the cuts.

        Decoding and preprocessing are included, writing to the store is not.
        """
        total = 0.0
        items_of_image = (1, self.spec.captions)
        sides = zip(self._towers(), self._live(), cuts, items_of_image, strict=True)
        for tower, source, cut, n_items in sides:
            if cut is not None:
                batch_seconds = self._encoding(tower, source(ENCODED_IMAGES), cut)
                total += n_items * batch_seconds / ENCODED_IMAGES
        return total

    def step(self, cuts: Cuts) -> float:
        """Return the seconds of a step with batches of the recipe's size.

        Where the device cannot hold such a batch, or smaller ones are slow already, the seconds are
        extrapolated along a line from the two largest batches that were timed.
        """
        _, batch_size, _ = steps_of(self.recipe, self.spec)
        timings: list[tuple[int, float]] = []
        for n_images in _sizes(batch_size):
            try:
                seconds = self._seconds(cuts, n_images, n_images < batch_size)
            except torch.OutOfMemoryError:
                if not timings:
                    raise
                break
            timings.append((n_images, seconds))
            # A line takes two points, however slow the first one is.
            if seconds > ENOUGH_SECONDS and len(timings) > 1:
                break
        return _extrapolated(timings, batch_size)

    @property
    def device(self) -> torch.device:
        """Return the device on which steps are timed."""
        return resolve_device("auto")

    def _seconds(self, cuts: Cuts, n_images: int, is_part: bool) -> float:
        """Return the median seconds of a warm step with batches of `n_images`.

        Args:
            is_part: whether the recipe's batches are larger.
        """
        _, _, accumulate = steps_of(self.recipe, self.spec)
        fit, pairs = self._fit(cuts, n_images, is_part)
        generator = torch.Generator().manual_seed(0)
        plan = StepCount(n_steps=2 * MOST_STEPS, per_epoch=MOST_STEPS, accumulate=accumulate)
        captions = self.recipe.loss.captions
        fit.model.train()

        def run() -> None:
            # Drawn lazily: drawing a batch is a piece of a step, and is timed with it.
            epochs = (
                batches(pairs, batch_size=n_images, generator=generator, captions=captions)
                for _ in range(accumulate)
            )
            take_step(fit, chain.from_iterable(epochs), plan)

        with seeded_generators(0, self.device):
            return self._median(run)

    def _median(self, run: Callable[[], object]) -> float:
        """Return the median seconds of two calls after a first one, more if they are short."""
        # The first call allocates memory and chooses kernels.
        run()
        seconds: list[float] = []
        while len(seconds) < 2 or (len(seconds) < MOST_STEPS and sum(seconds) < ENOUGH_SECONDS):
            seconds.append(timed_seconds(run, self.device, self.clock))
        return median(seconds)

    # --- what is run ------------------------------------------------------------------------------

    def _fit(self, cuts: Cuts, n_images: int, is_part: bool) -> tuple[Fit[Any], FeaturePairs]:
        captions = self.recipe.loss.captions
        if self.recipe.trains_heads_alone and cuts == ("pooled", "pooled"):
            return self._head_fit(n_images)
        towers = self._towers()
        dims = [tower.output_dim for tower in towers]
        live_towers: list[Tower | None] = []
        inner_cuts: list[int | None] = []
        for tower, cut in zip(towers, cuts, strict=True):
            live_towers.append(None if cut == "pooled" else tower)
            inner_cuts.append(cut if isinstance(cut, int) else None)
        teacher = self._teacher(towers[0], n_images)
        # Seeded, so that two timings of a recipe train the same model.
        with seeded_generators(0, self.device):
            model = build_around(
                live_towers,
                recipe=_unstandardized(self.recipe),
                dims=dims,
                device=self.device,
                cuts=inner_cuts,
                teacher=teacher,
            )
        sources = zip(towers, self._live(), cuts, (1, captions), strict=True)
        image_inputs, text_inputs = (
            self._inputs(tower, source=source, cut=cut, count=n_images * n_items)
            for tower, source, cut, n_items in sources
        )
        slice_size = self.spec.slice_size
        if slice_size is not None and is_part:
            # Half of a small batch, so that slices are run twice, as those of the full batch are.
            slice_size = max(1, min(slice_size, n_images // 2))
        fit = EncoderFit(
            model,
            inputs=(image_inputs, text_inputs),
            recipe=self.recipe,
            spec=FitEncoderSpec(slice_size=slice_size, device=str(self.device)),
            ranks=ALONE,
        )
        # Live inputs are looked up by row, so the "features" of these pairs are row numbers.
        pairs = FeaturePairs(
            image=torch.arange(n_images),
            text=torch.arange(n_images * captions),
            first_text=torch.arange(n_images + 1) * captions,
        )
        return fit, pairs

    def _head_fit(self, n_images: int) -> tuple[Fit[Any], FeaturePairs]:
        """Return a fit of heads on random features that are on the device."""
        captions = self.recipe.loss.captions
        # Only shapes are needed of the towers here, so their weights take no memory.
        towers = self._towers("meta")
        head_cuts = (self.recipe.image.cut, self.recipe.text.cut)
        features = []
        for tower, cut, n_items in zip(towers, head_cuts, (1, captions), strict=True):
            shape = self._row_shape(tower) if cut == "tokens" else (tower.output_dim,)
            n_rows = n_images * n_items
            features.append(torch.randn(n_rows, *shape, device=self.device).half())
        pairs = FeaturePairs(
            image=features[0],
            text=features[1],
            first_text=torch.arange(n_images + 1) * captions,
            device=self.device,
        )
        model = build_model(self.recipe, pairs, 0)
        return HeadFit(model, self.recipe, 0), pairs

    def _row_shape(self, tower: Tower) -> tuple[int, ...]:
        """Return (tokens, dim) after the last block of a tower on the meta device."""
        with torch.no_grad():
            return tuple(tower.run_to(tower.n_blocks, *example(tower, self.spec)).shape[1:])

    def _towers(self, device: str = "cpu") -> list[Tower]:
        with seeded_generators(0):
            towers = [self._shape(spec, device) for spec in (self.image, self.text)]
        return towers if device == "meta" else [tower.to(self.device) for tower in towers]

    def _shape(self, spec: EncoderSpec, device: str = "meta") -> Tower:
        is_frozen = self.recipe.towers.is_frozen(spec.modality)
        return shape_tower(spec, device, is_frozen)

    def _teacher(self, image: Tower, n_images: int) -> Teacher | None:
        if self.recipe.distillation is None:
            return None
        dim = self.teacher().dim if self.teacher else image.dim
        # Class probabilities are distributions; features of a teacher may be any numbers.
        features = torch.randn(n_images, dim, device=self.device).softmax(-1)
        return Teacher(dim=dim, features=features)

    # --- made-up inputs ---------------------------------------------------------------------------

    def _live(self) -> tuple[Callable[[int], Inputs], Callable[[int], Inputs]]:
        return self._images, self._texts

    def _images(self, count: int) -> ImageInputs:
        files = self._sampled()

        def open_image(key: str) -> Image.Image:
            # A few files are decoded again and again: decoding an image takes the same each time.
            return decode_image(files[int(key) % len(files)], key)

        return ImageInputs(
            keys=[str(row) for row in range(count)],
            open_image=open_image,
            preprocess=load_preprocess(self.image),
            device=self.device,
        )

    def _texts(self, count: int) -> "RandomTexts":
        ids, mask = made_up_texts(count, self.spec.tokens, _vocabulary(self._shape(self.text)))
        return RandomTexts(ids=ids, mask=mask, device=self.device)

    def _inputs(
        self,
        tower: Tower,
        source: Callable[[int], Inputs],
        cut: Cut | None,
        count: int,
    ) -> Inputs:
        if cut is None:
            return source(count)
        if cut == "pooled":
            pooled = torch.randn(count, tower.output_dim, device=self.device)
            return CachedInputs(features=pooled.half(), device=pooled.device)
        is_image = tower.modality == "image"
        shape_only = self._shape(self.image if is_image else self.text)
        shape = shape_only.run_to(cut, *example(shape_only, self.spec)).shape[1:]
        # Images all have the same number of tokens.
        lengths = None if is_image else made_up_lengths(count, self.spec.tokens)
        # On the CPU, as the trainer has them: moving a batch to the device belongs to a step.
        return TokenInputs(
            features=torch.randn(count, *shape).half(),
            n_valid=lengths,
            device=self.device,
        )

    def _sampled(self) -> list[bytes]:
        if not self._files:
            self._files = made_up_images() if self.sample is None else read_sample(self.sample)
        return self._files

    @torch.no_grad()
    def _encoding(self, tower: Tower, source: Inputs, cut: Cut) -> float:
        """Return the median seconds of a batch of ENCODED_IMAGES items below the cut."""
        rows = range(ENCODED_IMAGES)

        def run() -> None:
            tower.run_to(cut, *source.take(rows))

        return self._median(run)


@dataclass(frozen=True, kw_only=True)
class RandomTexts:
    """Hold random texts as inputs of a text tower."""

    ids: Tensor
    """Token ids [count, tokens]."""
    mask: Tensor
    """1 for a token, 0 for padding [count, tokens]."""
    device: torch.device

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return ids and mask of these rows, cut to the longest, on the device."""
        index = torch.tensor(rows)
        longest = max(self.lengths(rows))
        ids = self.ids[index, :longest]
        mask = self.mask[index, :longest]
        return ids.to(self.device), mask.to(self.device)

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return the tokens of each row."""
        lengths: list[int] = self.mask[torch.tensor(rows)].sum(1).tolist()
        return lengths


def _vocabulary(tower: Tower) -> int:
    """Count the rows of the token table: the largest table of embeddings."""
    tables = [module for module in tower.modules() if isinstance(module, nn.Embedding)]
    return max(table.num_embeddings for table in tables)


def made_up_lengths(count: int, tokens: int) -> Tensor:
    """Return lengths from all tokens down to half of them, as captions of one batch differ.

    The longest comes first, so that a single text has all tokens.
    """
    return torch.linspace(tokens, max(1, tokens // 2), count).long()


def made_up_texts(count: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Return random token ids and their mask, both [count, tokens]."""
    generator = torch.Generator().manual_seed(0)
    # The lowest ids are padding and special tokens in common vocabularies.
    lowest_id = min(3, vocabulary - 1)
    ids = torch.randint(lowest_id, vocabulary, (count, tokens), generator=generator)
    lengths = made_up_lengths(count, tokens).unsqueeze(1)
    mask = (torch.arange(tokens) < lengths).long()
    return ids * mask, mask


def made_up_images() -> list[bytes]:
    """Return JPEG files of smooth shades with a little noise, as photos have."""
    generator = np.random.default_rng(0)
    width, height = SAMPLE_SIZE
    return [_jpeg(generator, width, height) for _ in range(N_SAMPLES)]


def _jpeg(generator: np.random.Generator, width: int, height: int) -> bytes:
    shades = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    smooth = shades.resize((width, height), Image.Resampling.BICUBIC)
    # int16, as the noise is signed and may leave the range of a byte.
    pixels = np.asarray(smooth, dtype=np.int16)
    noisy = pixels + generator.integers(-8, 9, pixels.shape)
    image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=SAMPLE_QUALITY)
    return file.getvalue()


def read_sample(folder: Path) -> list[bytes]:
    """Read the first N_SAMPLES image files of a folder, by name.

    Raises:
        OptionError: the folder has no images.
    """
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    all_paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    paths = all_paths[:N_SAMPLES]
    if not paths:
        raise OptionError(
            f"{folder} has no images (.jpg, .png, .webp) to time with; give another folder to "
            "--sample"
        )
    return [path.read_bytes() for path in paths]


def _unstandardized(recipe: Recipe) -> Recipe:
    """Return the recipe without standardization.

    Its statistics are those of cached features, which are made up here. A step takes the same time
    whatever their values are.
    """
    update = {"standardize": False}
    sides = {
        "image": recipe.image.model_copy(update=update),
        "text": recipe.text.model_copy(update=update),
    }
    return recipe.model_copy(update=sides)


def _sizes(batch: int) -> Iterator[int]:
    """Yield the batch sizes to be timed: each is twice the last one, up to the recipe's."""
    n_images = min(batch, FIRST_IMAGES)
    while n_images < batch:
        yield n_images
        n_images = min(batch, 2 * n_images)
    yield batch


def _extrapolated(timings: Sequence[tuple[int, float]], batch: int) -> float:
    """Extrapolate the seconds of a batch along the line of the last two timings.

    Args:
        timings: (images in a batch, seconds), by rising size.
        batch: images in the batch that was not timed.
    """
    n_images, seconds = timings[-1]
    if n_images == batch or len(timings) == 1:
        return seconds * batch / n_images
    fewer_images, fewer_seconds = timings[-2]
    measured_slope = (seconds - fewer_seconds) / (n_images - fewer_images)
    # Timings are noisy: a line that is too flat would predict that large batches are free.
    least_slope = seconds / (2 * n_images)
    return seconds + (batch - n_images) * max(measured_slope, least_slope)
