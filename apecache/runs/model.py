"""A finished run in use, of either trainer: images and texts in, embeddings out, by the run's own
encoders."""

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.arguments import AnyPath, as_place, as_texts, require_type, wrong_type
from apecache.data.images import PICTURES, Picture, open_readable, require_picture
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError
from apecache.extraction.encode import caption_error
from apecache.runs.load import BATCH, Embed, Run, image_embedder, load_run, text_embedder
from apecache.runs.remote import fetched_run

Embeddings = NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ImageTextModel:
    """Embeddings are float32 [n, dim], L2-normalised, in the order given. Encoders of frozen sides
    are loaded when they are first needed. `image`, `text`: those that have moved, in place of the
    ones that the run names."""

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

    def encode_image(self, images: Iterable[Picture]) -> Embeddings:
        """Embed pictures, in the order given.

        Args:
            images: paths, bytes, binary file objects, PIL images, arrays uint8 [height, width, 3],
                or any mix of them. One picture has the same vector in every form; see
                `apecache.data.images.open_picture`.

        Raises:
            OptionError: an item that is no picture, before any is encoded. DataError: an image that
                cannot be read.
            EncoderError: the encoder cannot be had. MismatchError: it is not the one that the run
                was trained on.
        """
        pictures = (
            open_readable(image, f"images[{number}]")
            for number, image in enumerate(_listed(images))
        )
        parts = [_array(self._embed_images(batch)) for batch in _batches(pictures)]
        return np.concatenate([np.empty((0, self.dim), np.float32), *parts])

    def encode_text(self, texts: Iterable[str]) -> Embeddings:
        """Embed texts, in the order given. A text is never taken for the name of a file.

        Raises:
            OptionError: an item that is no text. DataError: a text that is empty or no Unicode.
                Else as `encode_image`.
        """
        checked = as_texts(texts, "texts")
        for number, text in enumerate(checked):
            if error := caption_error(text):
                raise DataError(f"text {number}: {error.detail}; give every text at least one word")
        parts = [_array(self._embed_texts(batch)) for batch in _batches(iter(checked))]
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
    run: AnyPath,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
    device: str = "auto",
) -> ImageTextModel:
    """A run of `fit_head` or `fit_encoder`, or heads that were combined, ready for images and
    texts. `run`: its folder, or a URL of object storage.

    Raises:
        RunError: no finished run there. EncoderError: the device cannot be used. Of towers that
            were trained, which are
        loaded here, also EncoderError: the encoder cannot be had. MismatchError: it is not the one
            that was trained.
    """
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    with fetched_run(as_place(run, "run")) as folder:
        return ImageTextModel(
            run=load_run(folder, device=device, image=image, text=text),
            image=image,
            text=text,
            device=device,
        )


def _listed(images: Iterable[Picture]) -> Iterable[Picture]:
    """The pictures, all checked by type where they are a list. Raises OptionError, also for a
    single picture."""
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
    if single or (isinstance(images, np.ndarray) and images.ndim == 3):
        found = type(images).__name__
        raise OptionError(f"images: a list is expected, found a single {found}; put it in brackets")
    if not isinstance(images, Iterable) or isinstance(images, Mapping | set):
        raise wrong_type(images, f"a list of pictures, each {PICTURES}", "images")
    if isinstance(images, list | tuple | np.ndarray):
        for number, image in enumerate(images):
            require_picture(image, f"images[{number}]")
    return images


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    while batch := list(islice(items, BATCH)):
        yield batch


def _array(embedded: Tensor) -> Embeddings:
    values: Embeddings = embedded.cpu().numpy()
    return values
