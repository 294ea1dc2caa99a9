"""Read the inputs of a training step.

For a frozen tower these are cached features, for a live one pixels, token ids or cached tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import cpu_count
from typing import Protocol

import torch
from torch import Tensor

from apecache.data.augment import Views
from apecache.data.decoding import MAX_THREADS
from apecache.data.images import Picture, open_picture
from apecache.device import send
from apecache.encoders.encoder import TextEncoder, bucket_length
from apecache.encoders.preprocess import Preprocess
from apecache.encoders.whole_view import WholeView, whole_view
from apecache.errors import DataError, RowError

OpenImage = Callable[[str], Picture]
"""Open the picture of a key, in any form that `open_picture` takes. Raises RowError."""


class Inputs(Protocol):
    """Read the inputs of one side by row of the store's table."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return the inputs of these rows and a mask, on the device.

        Returns:
            Features [n, dim], pixels [n, 3, height, width], token ids [n, length], or tokens
            [n, length, dim]; and the mask of valid tokens [n, length], or None.
        """

    def lengths(self, rows: Sequence[int]) -> list[int] | None:
        """Return the tokens of each of these rows, to which `take` pads; None: all are alike."""


@dataclass(frozen=True, kw_only=True)
class CachedInputs:
    """Read cached features of a frozen tower."""

    features: Tensor
    """[rows, dim], on the device, or on the host where they do not fit there."""
    device: torch.device
    """Device of the fit."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return features [n, dim], float32, without a mask."""
        index = torch.tensor(rows, device=self.features.device)
        taken = self.features[index]
        if taken.device != self.device:
            # Cast on the device: features that are stored in float16 are half the bytes to send.
            taken = send(taken, self.device)
        return taken.float(), None

    def lengths(self, rows: Sequence[int]) -> None:
        """Return None: features are not padded."""


@dataclass(frozen=True, kw_only=True)
class TokenInputs:
    """Read cached tokens after some blocks of a tower."""

    features: Tensor
    """[rows, tokens, dim], on the host."""
    n_valid: Tensor | None
    """int64 [rows], number of valid tokens; None: all are valid."""
    device: torch.device
    """Device of the tower."""
    in_buckets: bool = False
    """Whether batches have one of a few lengths, for a compiled tower."""

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return tokens [n, length, dim], float32, cut to the longest row, and their mask."""
        index = torch.tensor(rows)
        if self.n_valid is None:
            return self.features[index].to(self.device).float(), None
        lengths = self.n_valid[index]
        longest = int(lengths.max())
        if self.in_buckets:
            longest = bucket_length(longest, self.features.shape[1])
        mask = (torch.arange(longest) < lengths.unsqueeze(1)).long()
        # Cast on the device: tokens that are stored in float16 are half the bytes to send.
        tokens = self.features[index, :longest].to(self.device).float()
        return tokens, mask.to(self.device)

    def lengths(self, rows: Sequence[int]) -> list[int] | None:
        """Return the valid tokens of each row."""
        return None if self.n_valid is None else self.n_valid[torch.tensor(rows)].tolist()


@dataclass(frozen=True, kw_only=True)
class TextInputs:
    """Read texts as token ids."""

    ids: list[list[int]]
    """Token ids of all captions."""
    encoder: TextEncoder
    """Encoder that tokenized them."""
    in_buckets: bool = False
    """Whether batches have one of a few lengths, for a compiled tower."""

    @staticmethod
    def of(encoder: TextEncoder, captions: Sequence[str]) -> "TextInputs":
        """Tokenize all captions once."""
        return TextInputs(ids=encoder.tokenize(captions).ids, encoder=encoder)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return token ids and their mask, both [n, length], padded to the longest row."""
        ids = [self.ids[row] for row in rows]
        if not self.in_buckets:
            return self.encoder.pad(ids)
        longest = max(map(len, ids), default=1)
        return self.encoder.pad(ids, bucket_length(longest, self.encoder.max_tokens))

    def lengths(self, rows: Sequence[int]) -> list[int]:
        """Return the tokens of each row."""
        return [len(self.ids[row]) for row in rows]


ReadKey = tuple[int, int | None, int]
"""Row, caption and epoch of an image that is read."""


class ImageReader:
    """Keep threads that read images, and what they have read ahead."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: dict[ReadKey, Future[Tensor]] = {}

    def begin(
        self,
        key: ReadKey,
        read: Callable[[int, int | None], Tensor],
        threads: int,
    ) -> Future[Tensor]:
        """Begin to read one image, unless that has been begun."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        if key not in self._ahead:
            self._ahead[key] = self._pool.submit(read, key[0], key[1])
        return self._ahead[key]

    def forget(self, keys: Sequence[ReadKey]) -> None:
        """Forget images that have been taken."""
        for key in keys:
            self._ahead.pop(key, None)

    def close(self) -> None:
        """End the threads; images that have not been begun are not read."""
        self._ahead.clear()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def default_threads() -> int:
    """Return the number of threads that read images, as in extraction: one for each core."""
    return min(MAX_THREADS, cpu_count() or 1)


@contextmanager
def reading(inputs: Sequence[Inputs]) -> Iterator[None]:
    """End the threads of these inputs at the end, also after an error."""
    try:
        yield
    finally:
        for side in inputs:
            if isinstance(side, ImageInputs):
                side.reader.close()


@dataclass(frozen=True, kw_only=True)
class ImageInputs:
    """Read images as pixels, preprocessed as for extraction."""

    keys: Sequence[str]
    """Keys of all images."""
    open_image: OpenImage
    """Opens the picture of a key."""
    preprocess: Preprocess
    """Preprocessing of the encoder."""
    device: torch.device
    """Device of the tower."""
    workers: int = field(default_factory=default_threads)
    """Threads that read."""
    reader: ImageReader = field(default_factory=ImageReader, compare=False)
    """Threads and what they have read; views of the same images share it."""
    views: Views | None = None
    """Views that training sees; None: the images themselves."""
    epoch: int = 0
    """Epoch of the views. A view depends on its seed, the epoch, the key and the caption alone."""
    captions: Sequence[int] = ()
    """Rows of the captions that the images are taken with, where an epoch shows an image several
    times: each time in another view. Empty: the image has one view in the epoch."""

    def augmented(self, views: Views, epoch: int) -> "ImageInputs":
        """Return the inputs with views of an epoch, of which nothing is cropped."""
        whole_preprocess = self.preprocess
        if not isinstance(whole_preprocess, WholeView):
            whole_preprocess = whole_view(whole_preprocess)
        # A reader of its own: it has read these images as they are, for an evaluation.
        return replace(
            self,
            preprocess=whole_preprocess,
            views=views,
            epoch=epoch,
            reader=ImageReader(),
        )

    def read_ahead(self, rows: Sequence[int]) -> None:
        """Begin to read what `take` is about to be called for."""
        for key in self._keys(rows):
            self.reader.begin(key, self._read, self.workers)

    def take(self, rows: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """Return pixels [n, 3, height, width], without a mask."""
        keys = self._keys(rows)
        futures = [self.reader.begin(key, self._read, self.workers) for key in keys]
        pixels = [future.result() for future in futures]
        self.reader.forget(keys)
        return send(torch.stack(pixels), self.device), None

    def lengths(self, rows: Sequence[int]) -> None:
        """Return None: images are not padded."""

    def _keys(self, rows: Sequence[int]) -> list[ReadKey]:
        captions: Sequence[int | None] = self.captions or [None for _ in rows]
        return [(row, caption, self.epoch) for row, caption in zip(rows, captions, strict=True)]

    def _read(self, row: int, caption: int | None) -> Tensor:
        """Read one image. Raises DataError if it is unreadable."""
        key = self.keys[row]
        try:
            image = open_picture(self.open_image(key), key)
        except RowError as error:
            raise DataError(
                f"image of row {row} cannot be read ({error}); mend it, or take it out of the table"
            ) from None
        if self.views is not None:
            view_key = f"epoch {self.epoch} {key}"
            if caption is not None:
                view_key = f"{view_key} with caption {caption}"
            image = self.views.of(image, view_key)[0]
        return self.preprocess(image)
