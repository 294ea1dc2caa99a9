"""What a step of a plan takes on this machine: the trainers' own step, on random weights and
made-up inputs."""

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
from torch import Tensor

from apecache.data.images import decode_image
from apecache.encoders.encoder import parse_device
from apecache.encoders.load import load_preprocess, shape_tower
from apecache.encoders.spec import EncoderSpec
from apecache.encoders.tower import Cut, Tower
from apecache.errors import OptionError
from apecache.models.dual_encoder import Teacher, build_around
from apecache.plan.counting import PlanSpec, example
from apecache.plan.counting_shared import Taught
from apecache.plan.plan import Cuts, steps_of
from apecache.recipes.recipe import Recipe
from apecache.train.batches import FeaturePairs, batches
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.encoder_fit import EncoderFit
from apecache.train.live import CachedInputs, ImageInputs, Inputs, TokenInputs
from apecache.train.loop import Fit, Plan, Training, take_step
from apecache.train.model import build_model
from apecache.train.ranks import ALONE

FIRST_IMAGES = 16
ENOUGH_SECONDS = 0.5
"""A step that takes so long is not run with a larger batch: what is missing is extrapolated."""
MOST_STEPS = 9
SAMPLE_SIZE = (500, 375)
SAMPLE_QUALITY = 90
N_SAMPLES = 16
"""Made-up images are JPEGs as data sets of photos keep them."""
ENCODED_IMAGES = 32
"""In a batch of what is computed once, for the cache."""


@dataclass(kw_only=True)
class StepClock:
    """`apecache.plan.plan.Clock` on the CPU, or on CUDA if there is one. `sample`: a folder of
    images like those that will be trained on. `clock` may count the process's time instead, on a
    machine that others use too."""

    recipe: Recipe
    image: EncoderSpec
    text: EncoderSpec
    spec: PlanSpec
    teacher: Callable[[], Taught] | None = None
    sample: Path | None = None
    clock: Callable[[], float] = time.perf_counter
    _files: list[bytes] = field(default_factory=list)

    def once(self, cuts: Cuts) -> float:
        """Decoding and preprocessing included, writing to the store not."""
        total = 0.0
        for tower, source, cut, each in zip(
            self._towers(),
            self._live(),
            cuts,
            (1, self.spec.captions),
            strict=True,
        ):
            if cut is not None:
                total += each * self._encoding(tower, source(ENCODED_IMAGES), cut) / ENCODED_IMAGES
        return total

    def step(self, cuts: Cuts) -> float:
        """In batches of the recipe's size, or extrapolated along a line from the two largest that
        were timed."""
        _, batch, _ = steps_of(self.recipe, self.spec)
        found: list[tuple[int, float]] = []
        for n in _sizes(batch):
            try:
                found.append((n, self._seconds(cuts, n, n < batch)))
            except torch.OutOfMemoryError:
                if not found:
                    raise
                break
            if found[-1][1] > ENOUGH_SECONDS and len(found) > 1:
                break
        return _extrapolated(found, batch)

    @property
    def device(self) -> torch.device:
        return parse_device("auto")

    def _seconds(self, cuts: Cuts, n_images: int, is_part: bool) -> float:
        """Of a step of batches of `n_images`, warm: the median."""
        _, _, accumulate = steps_of(self.recipe, self.spec)
        fit, pairs = self._fit(cuts, n_images, is_part)
        generator = torch.Generator().manual_seed(0)
        plan = Plan(n_steps=2 * MOST_STEPS, per_epoch=MOST_STEPS, accumulate=accumulate)
        captions = self.recipe.loss.captions
        fit.model.train()

        def run() -> None:
            drawn = (
                batches(pairs, batch_size=n_images, generator=generator, captions=captions)
                for _ in range(accumulate)
            )
            float(take_step(fit, chain.from_iterable(drawn), plan))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self._median(run)

    def _median(self, run: Callable[[], object]) -> float:
        """Of two calls after a first one, or of more where they are short."""
        run()
        found: list[float] = []
        while len(found) < 2 or (len(found) < MOST_STEPS and sum(found) < ENOUGH_SECONDS):
            begin = self.clock()
            run()
            found.append(self.clock() - begin)
        return median(found)

    # --- what is run ------------------------------------------------------------------------------

    def _fit(self, cuts: Cuts, n_images: int, is_part: bool) -> tuple[Fit[Any], FeaturePairs]:
        captions = self.recipe.loss.captions
        if self.recipe.trains_heads_alone and cuts == ("pooled", "pooled"):
            return self._head_fit(n_images)
        towers = self._towers()
        dims = [tower.output_dim for tower in towers]
        cached = [cut == "pooled" for cut in cuts]
        live = [None if pooled else tower for tower, pooled in zip(towers, cached, strict=True)]
        teacher = self._teacher(towers[0], n_images)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            within = [cut if isinstance(cut, int) else None for cut in cuts]
            model = build_around(
                live,
                recipe=_unstandardised(self.recipe),
                dims=dims,
                device=self.device,
                cuts=within,
                teacher=teacher,
            )
        sources = zip(towers, self._live(), cuts, (1, captions), strict=True)
        image, text = (
            self._inputs(tower, source=source, cut=cut, count=n_images * each)
            for tower, source, cut, each in sources
        )
        slices = self.spec.slice_size
        if slices is not None and is_part:
            slices = max(
                1,
                min(slices, n_images // 2),
            )  # so that slices are run twice, as those of the batch are
        spec = FitEncoderSpec(slice_size=slices, device=str(self.device))
        rows = (
            torch.arange(n_images),
            torch.arange(n_images * captions),
            torch.arange(n_images + 1) * captions,
        )
        image_value, text_value, first_text = rows
        return EncoderFit(
            model,
            inputs=(image, text),
            recipe=self.recipe,
            spec=spec,
            ranks=ALONE,
        ), FeaturePairs(image=image_value, text=text_value, first_text=first_text)

    def _head_fit(self, n_images: int) -> tuple[Fit[Any], FeaturePairs]:
        """Of heads on features that are on the device."""
        captions = self.recipe.loss.captions
        cuts = zip(self._towers("meta"), (self.recipe.image.cut, self.recipe.text.cut), strict=True)
        shapes = [
            self._row_shape(tower) if cut == "tokens" else (tower.output_dim,)
            for tower, cut in cuts
        ]
        image, text = (
            torch.randn(n_images * each, *shape, device=self.device).half()
            for each, shape in zip((1, captions), shapes, strict=True)
        )
        first = torch.arange(n_images + 1, device=self.device) * captions
        pairs = FeaturePairs(image=image, text=text, first_text=first, device=self.device)
        return Training(build_model(self.recipe, pairs, 0), self.recipe, 0), pairs

    def _row_shape(self, tower: Tower) -> tuple[int, ...]:
        """(tokens, dim) after the last block, of a tower on the meta device."""
        with torch.no_grad():
            return tuple(tower.run_to(tower.n_blocks, *example(tower, self.spec)).shape[1:])

    def _towers(self, device: str = "cpu") -> list[Tower]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            towers = [shape_tower(spec, device) for spec in (self.image, self.text)]
        return towers if device == "meta" else [tower.to(self.device) for tower in towers]

    def _teacher(self, image: Tower, n_images: int) -> Teacher | None:
        if self.recipe.distillation is None:
            return None
        dim = self.teacher().dim if self.teacher else image.dim
        return Teacher(dim=dim, features=torch.randn(n_images, dim, device=self.device).softmax(-1))

    # --- made-up inputs ---------------------------------------------------------------------------

    def _live(self) -> tuple[Callable[[int], Inputs], Callable[[int], Inputs]]:
        return self._images, self._texts

    def _images(self, count: int) -> ImageInputs:
        files = self._sampled()
        keys = [str(row) for row in range(count)]
        open_image = lambda key: decode_image(files[int(key) % len(files)], key)  # noqa: E731
        return ImageInputs(
            keys=keys,
            open_image=open_image,
            preprocess=load_preprocess(self.image),
            device=self.device,
        )

    def _texts(self, count: int) -> "MadeUpTexts":
        tower = shape_tower(self.text)
        table = next(part for part in tower.parts() if part.place == "token_embedding")
        ids, mask = made_up_texts(count, self.spec.tokens, table.count // tower.dim)
        return MadeUpTexts(ids=ids, mask=mask, device=self.device)

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
            return CachedInputs(
                features=torch.randn(count, tower.output_dim, device=self.device).half()
            )
        image = tower.modality == "image"
        shape_only = shape_tower(self.image if image else self.text)
        shape = shape_only.run_to(cut, *example(shape_only, self.spec)).shape[1:]
        lengths = None if image else made_up_lengths(count, self.spec.tokens)
        return TokenInputs(
            features=torch.randn(count, *shape).half(),
            lengths=lengths,
            device=self.device,
        )

    def _sampled(self) -> list[bytes]:
        if not self._files:
            self._files = made_up_images() if self.sample is None else read_sample(self.sample)
        return self._files

    @torch.inference_mode()
    def _encoding(self, tower: Tower, source: Inputs, cut: Cut) -> float:
        """Of a batch, below the cut."""
        rows = range(ENCODED_IMAGES)
        return self._median(lambda: float(tower.run_to(cut, *source.take(rows)).sum()))


@dataclass(frozen=True, kw_only=True)
class MadeUpTexts:
    """Token ids and mask [count, tokens]."""

    ids: Tensor
    mask: Tensor
    device: torch.device

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        index = torch.tensor(rows)
        return self.ids[index].to(self.device), self.mask[index].to(self.device)


def made_up_lengths(count: int, tokens: int) -> Tensor:
    """From half as many up to all, as captions of one batch differ; the longest comes first."""
    return torch.linspace(tokens, max(1, tokens // 2), count).long()


def made_up_texts(count: int, tokens: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(3, vocabulary - 1), vocabulary, (count, tokens), generator=generator)
    mask = (torch.arange(tokens) < made_up_lengths(count, tokens).unsqueeze(1)).long()
    return ids * mask, mask


def made_up_images() -> list[bytes]:
    """Smooth shades with a little noise, as photos have."""
    generator = np.random.default_rng(0)
    width, height = SAMPLE_SIZE
    return [_jpeg(generator, width, height) for _ in range(N_SAMPLES)]


def _jpeg(generator: np.random.Generator, width: int, height: int) -> bytes:
    shades = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    pixels = np.asarray(shades.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = (pixels + generator.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=SAMPLE_QUALITY)
    return file.getvalue()


def read_sample(folder: Path) -> list[bytes]:
    """Raises OptionError for a folder without images."""
    suffixes = {".jpg", ".jpeg", ".png", ".webp"}
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)[
        :N_SAMPLES
    ]
    if not paths:
        raise OptionError(
            f"{folder} has no images (.jpg, .png, .webp) to time with; give another folder to "
            "--sample"
        )
    return [path.read_bytes() for path in paths]


def _unstandardised(recipe: Recipe) -> Recipe:
    """Statistics are those of cached features, and cost the same whatever they are."""
    sides = {
        side: getattr(recipe, side).model_copy(update={"standardise": False})
        for side in ("image", "text")
    }
    return recipe.model_copy(update=sides)


def _sizes(batch: int) -> Iterator[int]:
    """Batches to be timed: twice as many images each time, up to the recipe's."""
    n = min(batch, FIRST_IMAGES)
    while n < batch:
        yield n
        n = min(batch, 2 * n)
    yield batch


def _extrapolated(found: Sequence[tuple[int, float]], batch: int) -> float:
    """Along the line of the last two, which rises by no less than half of the last one's share of
    each image."""
    n, seconds = found[-1]
    if n == batch or len(found) == 1:
        return seconds * batch / n
    before, earlier = found[-2]
    return seconds + (batch - n) * max((seconds - earlier) / (n - before), seconds / (2 * n))
