"""A finished run in use, of either trainer: images and texts in, embeddings out, by the run's own encoders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.data.images import decode_image, to_rgb
from apecache.data.media import read_file
from apecache.encode import caption_error
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, RowError
from apecache.recipes.remote_runs import fetched_run
from apecache.recipes.runs import BATCH, Embed, Run, image_embedder, load_run, text_embedder

Picture = str | Path | Image.Image
Embeddings = NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageTextModel:
    """Embeddings are float32 [n, dim], L2-normalised, in the order given. Encoders of frozen sides are loaded when they
    are first needed. `image`, `text`: those that have moved, in place of the ones that the run names."""

    run: Run
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"

    @property
    def dim(self) -> int:
        return self.run.image.dim

    @property
    def scale(self) -> float:
        """What cosines are multiplied with before a softmax: 1 / the learned temperature."""
        return self.run.scale

    def encode_image(self, images: Sequence[Picture]) -> Embeddings:
        """Paths, or PIL images (taken as they are, in RGB).

        Raises:
            DataError: an image that cannot be read. EncoderError: the encoder cannot be had. MismatchError: it is not
            the one that the run was trained on.
        """
        pictures = (_open(image) for image in _listed(images))
        parts = [_array(self._embed_images(batch)) for batch in _batches(pictures)]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Raises DataError for a text that is empty or no Unicode, else as `encode_image` does."""
        wanted = list(_listed(texts))
        for number, text in enumerate(wanted):
            if error := caption_error(text):
                raise DataError(f"text {number}: {error.detail}; give every text at least one word")
        parts = [_array(self._embed_texts(batch)) for batch in _batches(iter(wanted))]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def similarity(self, image: Embeddings, text: Embeddings) -> Embeddings:
        """float32 [n_images, n_texts]: cosines times `scale`, the logits of the training."""
        scores: Embeddings = (self.scale * (image @ text.T)).astype(np.float32)
        return scores

    @cached_property
    def _embed_images(self) -> Embed:
        return image_embedder(self.run.image, self.device, self.image)

    @cached_property
    def _embed_texts(self) -> Embed:
        return text_embedder(self.run.text, self.device, self.text)


def load(
    run: Path | str, image: EncoderSpec | None = None, text: EncoderSpec | None = None, device: str = "auto"
) -> ImageTextModel:
    """A run of `fit_head` or `fit_encoder`, or heads that were combined, ready for images and texts. `run`: its folder,
    or a URL of object storage.

    Raises:
        RunError: no finished run there. EncoderError: the device cannot be used. Of towers that were trained, which are
        loaded here, also EncoderError: the encoder cannot be had. MismatchError: it is not the one that was trained.
    """
    with fetched_run(run) as folder:
        return ImageTextModel(load_run(folder, device, image, text), image, text, device)


def _listed(values: Sequence[Item]) -> Sequence[Item]:
    """Raises DataError for a single one, which would be taken letter by letter."""
    if isinstance(values, str | Path | Image.Image):
        raise DataError(f"a list is expected, found a single {type(values).__name__}; put it in brackets")
    return values


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(islice(items, BATCH)):
        yield batch


def _open(image: Picture) -> Image.Image:
    if isinstance(image, Image.Image):
        return to_rgb(image)
    try:
        return decode_image(read_file(Path(image), str(image)), str(image))
    except RowError as error:
        raise DataError(f"image {image} cannot be read: {error.detail}") from None


def _array(embedded: Tensor) -> Embeddings:
    values: Embeddings = embedded.cpu().numpy()
    return values
