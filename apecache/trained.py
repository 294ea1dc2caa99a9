"""A finished run in use: images and texts in, embeddings out, by the run's own encoders and heads."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.data.images import decode_image, to_rgb
from apecache.data.media import read_file
from apecache.encode import caption_error
from apecache.encoders.encoder import ImageEncoder, TextEncoder, parse_device
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import EncoderSpec, spec_from_json
from apecache.errors import DataError, RowError
from apecache.heads.checkpoint import TrainedHeads, load_heads

Picture = str | Path | Image.Image
Embeddings = NDArray[np.float32]
Item = TypeVar("Item")
BATCH = 64


@dataclass(frozen=True)
class ImageTextModel:
    """Embeddings are float32 [n, dim], L2-normalised, in the order given. Encoders are loaded when they are first
    needed. `image`, `text`: encoders that have moved, in place of those that the run names."""

    heads: TrainedHeads
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"

    @property
    def dim(self) -> int:
        return self.heads.image.head.out_dim

    @property
    def scale(self) -> float:
        """What cosines are multiplied with before a softmax: 1 / the learned temperature."""
        return self.heads.scale

    def encode_image(self, images: Sequence[Picture]) -> Embeddings:
        """Paths, or PIL images (taken as they are, in RGB).

        Raises:
            DataError: an image that cannot be read. EncoderError: the encoder cannot be had. MismatchError: it is not
            the one that the heads were trained on.
        """
        pictures = (_open(image) for image in _listed(images))
        parts = [self._image_batch(batch) for batch in _batches(pictures)]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def encode_text(self, texts: Sequence[str]) -> Embeddings:
        """Raises DataError for a text that is empty or no Unicode, else as `encode_image` does."""
        wanted = list(_listed(texts))
        for number, text in enumerate(wanted):
            if error := caption_error(text):
                raise DataError(f"text {number}: {error.detail}; give every text at least one word")
        parts = [self._text_batch(batch) for batch in _batches(iter(wanted))]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def similarity(self, image: Embeddings, text: Embeddings) -> Embeddings:
        """float32 [n_images, n_texts]: cosines times `scale`, the logits of the training."""
        scores: Embeddings = (self.scale * (image @ text.T)).astype(np.float32)
        return scores

    def _image_batch(self, pictures: Sequence[Image.Image]) -> Embeddings:
        encoder = self._image_encoder
        pixels = torch.stack([encoder.preprocess(picture) for picture in pictures])
        return _array(self.heads.image.embed(encoder.encode(pixels)))

    def _text_batch(self, texts: Sequence[str]) -> Embeddings:
        encoder = self._text_encoder
        ids = encoder.tokenise(texts).ids
        features = encoder.encode_ids(ids)
        lengths = torch.tensor([len(row) for row in ids]) if features.ndim == 3 else None
        return _array(self.heads.text.embed(features, lengths))

    @cached_property
    def _image_encoder(self) -> ImageEncoder:
        encoder = load_image_encoder(self.image or spec_from_json(self.heads.image.encoder), self.device)
        self.heads.image.require_encoder(encoder.fingerprint, f"image encoder {encoder.spec}")
        return encoder

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        encoder = load_text_encoder(self.text or spec_from_json(self.heads.text.encoder), self.device)
        self.heads.text.require_encoder(encoder.fingerprint, f"text encoder {encoder.spec}")
        return encoder


def load(
    run: Path | str, image: EncoderSpec | None = None, text: EncoderSpec | None = None, device: str = "auto"
) -> ImageTextModel:
    """A run of `fit_head`, or heads that were combined, ready for images and texts.

    Raises:
        RunError: no finished run there. EncoderError: the device cannot be used.
    """
    return ImageTextModel(load_heads(Path(run), parse_device(device)), image, text, device)


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
