"""Use a finished run of either trainer: embed images and texts with the run's own encoders."""

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
from apecache.extraction.encode_texts import caption_error
from apecache.runs.bundle import bundled_encoders
from apecache.runs.load import BATCH, Embed, Run, image_embedder, load_run, text_embedder
from apecache.runs.remote import fetched_run
from apecache.storage.bucket import is_object_url

Embeddings = NDArray[np.float32]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class ImageTextModel:
    """Embed images and texts as float32 [n, dim], L2-normalized, in the order given.

    Encoders of frozen sides are loaded when they are first needed.
    """

    run: Run
    """Finished run."""
    image: EncoderSpec | None = None
    """Image encoder at its new place; None: the one that the run names."""
    text: EncoderSpec | None = None
    """Text encoder at its new place; None: the one that the run names."""
    device: str = "auto"
    """Device of the encoders that are loaded later."""

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self.run.image.dim

    @property
    def scale(self) -> float:
        """Factor of the cosines before a softmax: 1 / the learned temperature."""
        return self.run.scale

    @property
    def bias(self) -> float:
        """Added to the scaled cosines by the sigmoid loss; 0 for other losses."""
        return self.run.bias or 0.0

    def encode_image(self, images: Iterable[Picture]) -> Embeddings:
        """Embed pictures, in the order given.

        Args:
            images: Paths, bytes, binary file objects, PIL images, arrays uint8 [height, width, 3],
                or any mix of them. One picture has the same vector in every form; see
                `apecache.data.images.open_picture`.

        Raises:
            OptionError: An item is not a picture. The items of a list are checked before any is
                encoded.
            DataError: An image cannot be read.
            EncoderError: The encoder cannot be loaded.
            MismatchError: The encoder is not the one that the run was trained on.
        """
        # A generator: only the pictures of one batch are open at a time.
        pictures = (
            open_readable(image, f"images[{number}]")
            for number, image in enumerate(_listed(images))
        )
        embedded_batches = [_array(self._embed_images(batch)) for batch in _batches(pictures)]
        # The empty array gives the result its width where there is no picture.
        return np.concatenate([np.empty((0, self.dim), np.float32), *embedded_batches])

    def encode_text(self, texts: Iterable[str]) -> Embeddings:
        """Embed texts, in the order given. A text is never taken for the name of a file.

        Raises:
            OptionError: An item is not a text.
            DataError: A text is empty or not Unicode.
            EncoderError: The encoder cannot be loaded.
            MismatchError: The encoder is not the one that the run was trained on.
        """
        checked = as_texts(texts, "texts")
        for number, text in enumerate(checked):
            if error := caption_error(text):
                raise DataError(f"text {number}: {error.detail}; give every text at least one word")
        embedded_batches = [_array(self._embed_texts(batch)) for batch in _batches(iter(checked))]
        return np.concatenate([np.empty((0, self.dim), np.float32), *embedded_batches])

    def similarity(self, image: Embeddings, text: Embeddings) -> Embeddings:
        """Return the logits of training: cosines times `scale`, plus `bias`.

        Returns:
            float32 [n_images, n_texts].
        """
        scores: Embeddings = (self.scale * (image @ text.T) + self.bias).astype(np.float32)
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
    """Load a run of `fit_head` or `fit_encoder`, or combined heads, for images and texts.

    Encoders whose towers were trained are loaded here, others when they are first needed.

    Args:
        run: Folder of the run or bundle, its URL on object storage, or `hf://ORG/NAME` on the
            Hugging Face hub, with `@REVISION` if it is not the newest.
        image: Image encoder at its new place, if it has moved.
        text: Text encoder at its new place, if it has moved.
        device: Device of the encoders and heads.

    Raises:
        RunError: `run` is not a finished run.
        OptionError: The device cannot be used.
        EncoderError: A trained encoder cannot be loaded.
        MismatchError: A trained encoder is not the one that was trained.
    """
    require_type(image, EncoderSpec, "image", optional=True)
    require_type(text, EncoderSpec, "text", optional=True)
    # All weights are read here: a copy that was fetched is removed at the end of the block.
    run_place = as_place(run, "run")
    with fetched_run(run_place) as folder:
        bundled_image, bundled_text = bundled_encoders(folder)
        model = ImageTextModel(
            run=load_run(
                folder,
                device=device,
                image=image or bundled_image,
                text=text or bundled_text,
            ),
            image=image or bundled_image,
            text=text or bundled_text,
            device=device,
        )
        if is_object_url(run_place) and (bundled_image or bundled_text):
            # The encoders lie in the copy that is removed below.
            model.encode_text(["a"])
            model.encode_image([Image.new("RGB", (32, 32))])
        return model


def _listed(images: Iterable[Picture]) -> Iterable[Picture]:
    """Return the pictures, with the types of a list's items checked.

    Raises:
        OptionError: `images` is a single picture or not iterable, or an item is not a picture.
    """
    # Strings, bytes and one image's array are iterable too: their items are not pictures.
    single = isinstance(images, str | bytes | os.PathLike | Image.Image) or hasattr(images, "read")
    if single or (isinstance(images, np.ndarray) and images.ndim == 3):
        type_name = type(images).__name__
        raise OptionError(
            f"images: a list is expected, found a single {type_name}; put it in brackets"
        )
    if not isinstance(images, Iterable) or isinstance(images, Mapping | set):
        raise wrong_type(images, f"a list of pictures, each {PICTURES}", "images")
    if isinstance(images, list | tuple | np.ndarray):
        for number, image in enumerate(images):
            require_picture(image, f"images[{number}]")
    return images


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Yield the items in lists of at most `BATCH`."""
    while batch := list(islice(items, BATCH)):
        yield batch


def _array(embedded: Tensor) -> Embeddings:
    values: Embeddings = embedded.cpu().numpy()
    return values
