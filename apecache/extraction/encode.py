"""Encode images, one shard after another: the loop around the models.

Which rows share a batch depends on the shard and the batch size only. Batches have one fixed shape,
and a row that cannot be read keeps its slot as a filler. Several arrays of one modality are filled
together: each image is decoded once, and cuts of one model cost one forward pass.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.data.augment import Views
from apecache.data.decoding import Decode, Preprocessed, open_decoders, reading_ahead
from apecache.data.images import LoadedImage, load_as, load_image
from apecache.data.tensors import decode_tensor
from apecache.device import HostCopy, is_accelerator, release_cached_memory
from apecache.encoders.encoder import ImageEncoder, TextEncoder, compile_images, encode_images
from apecache.encoders.preprocess import Preprocess
from apecache.encoders.whole_view import whole_view
from apecache.errors import RowError
from apecache.extraction.device_decoding import decode_device, open_device_decoders
from apecache.extraction.segments import BlockInputs, Inputs
from apecache.store.layout import ArrayLayout, ArrayRecord

Advance = Callable[[int], None]
"""Called with the number of rows of every encoded batch."""
Encoder = TypeVar("Encoder", ImageEncoder, TextEncoder, covariant=True)


@dataclass(frozen=True, kw_only=True)
class ArrayTarget(Generic[Encoder]):
    """Pair one array with the encoder that fills it."""

    encoder: Encoder
    record: ArrayRecord


@dataclass(frozen=True, kw_only=True)
class EncodedShard:
    """Hold the encoded rows of one shard."""

    features: tuple[NDArray[np.floating], ...]
    """For each target [n, *row_shape], float16 or float32 as they are stored; zeros for rows that
    could not be encoded."""
    finite: tuple[NDArray[np.bool_], ...]
    """For each target [n]: whether all values of a row were finite before they were rounded."""
    content: list[str]
    """Hashes of the inputs, one for each row."""
    bad: dict[int, RowError]
    """Rows that could not be encoded, by their index in the shard."""
    lengths: NDArray[np.int64] | None = None
    """For texts: the number of tokens of each row."""
    n_truncated: int = 0
    """For texts: how many were longer than the encoder takes."""


class ShardRows:
    """Collect the rows of one shard of one array.

    Args:
        n_rows: of the shard.
        layout: of the array.
    """

    def __init__(self, n_rows: int, layout: ArrayLayout) -> None:
        # An overflow gives infinity, which a commit finds and reports by row.
        self.dtype = torch.float16 if layout.read_dtype == "float16" else torch.float32
        self.features = np.zeros((n_rows, *layout.row_shape), layout.read_dtype)
        self.finite = np.ones(n_rows, np.bool_)

    def copy_of(self, encoded: Tensor) -> "RowCopy":
        """Start to copy rows of a batch to the host.

        Args:
            encoded: float32 [n, *row_shape] on the device.
        """
        return RowCopy(encoded, self.dtype)


class RowCopy:
    """Copy encoded rows to the host, rounded on the device to the type that is stored."""

    def __init__(self, encoded: Tensor, dtype: torch.dtype) -> None:
        # After the rounding an overflow could not be told from a model that gives infinity.
        self._finite = HostCopy(encoded.isfinite().flatten(1).all(1))
        self._rows = HostCopy(encoded.to(dtype))

    def finite(self) -> NDArray[np.bool_]:
        """Wait for the copy; return bool [n], whether all values of a row were finite."""
        is_finite: NDArray[np.bool_] = self._finite.read().numpy()
        return is_finite

    def rows(self) -> NDArray[np.floating]:
        """Wait for the copy; return float16 or float32 [n, *row_shape]."""
        rows: NDArray[np.floating] = self._rows.read().numpy()
        return rows


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Encode the images of one source into arrays with the same shards, batches and resizing."""

    source: Inputs
    targets: tuple[ArrayTarget[ImageEncoder], ...]
    workers: int
    """Decoding processes; 0: threads."""
    views: Views | None = None
    hang_seconds: float = 30.0
    """Seconds after which a decoding process that gives no image is replaced."""

    @property
    def layout(self) -> ArrayLayout:
        return self.targets[0].record.layout

    def key(self, row: int) -> str:
        return self.source.keys[row]

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        """Encode shards one by one.

        Args:
            indices: of the shards.
            advance: called with the number of rows of every encoded batch.
        """
        with self.decoders() as decode:
            yield from self.shards_by(decode, indices, advance)

    def shards_by(
        self,
        decode: Decode,
        indices: Sequence[int],
        advance: Advance,
    ) -> Iterator[EncodedShard]:
        """Encode shards as `shards` does, by decoders that are open."""
        shards = [self.layout.shard(index) for index in indices]
        all_rows = [row for rows in shards for row in rows]
        # One call for all shards, so that decoders prefetch across their boundaries.
        decoded = decode(all_rows)
        for rows in shards:
            use_threads(self.layout)
            yield self._encode(rows, decoded, advance)

    def decoders(self) -> AbstractContextManager[Decode]:
        """Start decoders of the source's rows, at most two batches ahead of the consumer."""
        if self.decodes_on_device:
            return open_device_decoders(
                self.source.keys,
                media=self.source.media,
                rules=self.source.pixels,
                encoders=[first.encoder for first, *_ in self.models],
                layout=self.layout,
            )
        n_images_ahead = 2 * self.layout.batch_size + self.workers
        ahead = reading_ahead(
            self.source.media,
            workers=self.workers,
            images=n_images_ahead,
            hang_seconds=self.hang_seconds,
        )
        shapes = [(self.n_views, *first.encoder.input_shape) for first, *_ in self.models]
        return open_decoders(
            self.source.keys,
            load=self.load,
            preprocess=self.preprocess,
            shapes=shapes,
            ahead=ahead,
            dtype=self.pixel_dtype,
        )

    def load(self, key: str) -> LoadedImage[Any]:
        """Load one image: as a tensor for encoders that resize tensors, else as Pillow's image."""
        # Views are drawn from Pillow's images.
        if self.targets[0].encoder.spec.resize == "torchvision" and not self.views:
            return load_as(decode_tensor, key, self.source.media, self.source.pixels)
        return load_image(key, self.source.media, self.source.pixels)

    def preprocess(self, loaded: LoadedImage[Any]) -> list[Tensor]:
        """Return for each model the pixels of one image, [n_views, 3, height, width]."""
        images = self.views.of(loaded.image, loaded.digest) if self.views else [loaded.image]
        pixels_by_model: list[Tensor] = []
        for first, reference in zip(self.models, self.preprocesses, strict=True):
            preprocess: Callable[[Any], Tensor] = reference
            in_two_steps = first[0].encoder.pixel_preprocess
            if self.pixel_dtype == torch.uint8 and in_two_steps is not None:
                preprocess = in_two_steps.pixels
            pixels = [preprocess(image) for image in images]
            pixels_by_model.append(torch.stack(pixels))
        return pixels_by_model

    @cached_property
    def preprocesses(self) -> list[Preprocess]:
        """Return the preprocessing of each model. Of a view nothing is cropped."""
        references = [first.encoder.preprocess for first, *_ in self.models]
        return [whole_view(reference) for reference in references] if self.views else references

    @cached_property
    def pixel_dtype(self) -> torch.dtype:
        """Return the type of pixels that are sent to the device: uint8 if all encoders normalize.

        That is a quarter of the bytes. A CPU has nothing to send, and of views nothing is cropped.
        """
        if self.decodes_on_device:
            return torch.uint8
        encoders = [first.encoder for first, *_ in self.models]
        in_two_steps = all(encoder.pixel_preprocess is not None for encoder in encoders)
        sends_bytes = in_two_steps and is_accelerator(encoders[0].device) and self.views is None
        return torch.uint8 if sends_bytes else torch.float32

    @property
    def decodes_on_device(self) -> bool:
        """Return whether the device decodes the images, and not the CPU."""
        return decode_device(self.targets[0].record) == "cuda"

    @property
    def n_views(self) -> int:
        """Return the number of views of each image; 1 without augmentation."""
        return self.views.count if self.views else 1

    @property
    def models(self) -> list[list[ArrayTarget[ImageEncoder]]]:
        """Return the targets, grouped by model."""
        return _by_module(self.targets)

    @cached_property
    def passes(self) -> list[Callable[[Tensor], list[Tensor]]]:
        """Return one forward pass for each model, for all of its cuts."""
        passes: list[Callable[[Tensor], list[Tensor]]] = []
        for targets in self.models:
            cuts = [target.encoder for target in targets]
            compiled = self.layout.compiled
            passes.append(compile_images(cuts) if compiled else partial(encode_images, cuts))
        return passes

    @cached_property
    def buffers(self) -> list["_PixelBuffers"]:
        """Return the batches of pixels of each model, for all shards: pinning memory is slow."""
        size = self.layout.batch_size
        return [
            _PixelBuffers(
                targets,
                size=size,
                views=self.n_views,
                dtype=self.pixel_dtype,
                on_device=self.decodes_on_device,
            )
            for targets in self.models
        ]

    def _changed(self, row: int, digest: str) -> RowError | None:
        """Return an error for a file that is not the one that the row was made for."""
        if not isinstance(self.source, BlockInputs):
            return None
        expected = self.source.contents[row]
        if expected in ("", digest):
            return None
        return RowError("changed", f"{self.key(row)} is not what it was; the table's view has it")

    def _encode(
        self,
        rows: range,
        decoded: Iterator[Preprocessed[list[Tensor]]],
        advance: Advance,
    ) -> EncodedShard:
        """Encode one shard, whose images come next in `decoded`."""
        batch_size = self.layout.batch_size
        shard_rows = {
            id(target): ShardRows(len(rows), target.record.layout) for target in self.targets
        }
        content = [""] * len(rows)
        bad = dict[int, RowError]()
        running: list[_PendingBatch] = []
        for begin in range(0, len(rows), batch_size):
            count = min(batch_size, len(rows) - begin)
            batches = [buffer.next() for buffer in self.buffers]
            for slot in range(count):
                row = next(decoded)
                content[begin + slot] = row.digest
                error = row.error or self._changed(rows[begin + slot], row.digest)
                # A row that cannot be read has no pixels: its slot stays zero.
                if row.value is not None and error is None:
                    for batch, pixels in zip(batches, row.value, strict=True):
                        batch[slot] = pixels
                if error is not None:
                    bad[begin + slot] = error
                    content[begin + slot] = ""
            started: list[_PendingBatch] = []
            for targets, encode, batch in zip(self.models, self.passes, batches, strict=True):
                pending_batch = _PendingBatch(
                    targets,
                    shard_rows=[shard_rows[id(target)] for target in targets],
                    encode=encode,
                    begin=begin,
                    count=count,
                    pixels=batch,
                )
                started.append(pending_batch)
            # Fetch the results of the batch before while the device computes this one.
            _finish(running)
            running = started
            advance(count)
        _finish(running)
        by_target = [shard_rows[id(target)] for target in self.targets]
        return EncodedShard(
            features=tuple(target_rows.features for target_rows in by_target),
            finite=tuple(target_rows.finite for target_rows in by_target),
            content=content,
            bad=bad,
        )


class _PixelBuffers:
    """Hold the batches of pixels of one model: one on the CPU, two for an accelerator."""

    def __init__(
        self,
        targets: Sequence[ArrayTarget[ImageEncoder]],
        size: int,
        views: int,
        dtype: torch.dtype,
        on_device: bool,
    ) -> None:
        encoder = targets[0].encoder
        shape = (size, views, *encoder.input_shape)
        self.turn = 0
        # Pixels that the device has decoded stay there.
        if on_device:
            self.buffers = [torch.zeros(shape, dtype=dtype, device=encoder.device)]
            return
        # Beside an accelerator one pinned batch is filled while the other is copied and encoded.
        pinned = is_accelerator(encoder.device)
        n_buffers = 2 if pinned else 1
        self.buffers = [
            torch.zeros(shape, dtype=dtype, pin_memory=pinned) for _ in range(n_buffers)
        ]

    def next(self) -> Tensor:
        """Return a batch of zeros to fill; the buffers take turns."""
        self.turn += 1
        return self.buffers[self.turn % len(self.buffers)].zero_()


class _PendingBatch:
    """Start a batch on a model; its results are fetched once the next batch has been started."""

    def __init__(
        self,
        targets: Sequence[ArrayTarget[ImageEncoder]],
        shard_rows: Sequence[ShardRows],
        encode: Callable[[Tensor], list[Tensor]],
        begin: int,
        count: int,
        pixels: Tensor,
    ) -> None:
        self.shard_rows = shard_rows
        self.batch_rows = slice(begin, begin + count)
        self.of_views = targets[0].record.layout.views is not None
        device = targets[0].encoder.device
        self.copies: list[list[RowCopy]] = []
        for view in range(pixels.shape[1]):
            encoded = encode_or_halve(encode, pixels[:, view], device)
            # Copied now: a copy behind the next batch would wait for it. The last batch of a shard
            # is filled up with zeros, which are not stored.
            copies = [
                rows.copy_of(features[:count])
                for rows, features in zip(shard_rows, encoded, strict=True)
            ]
            self.copies.append(copies)

    def store(self) -> None:
        """Wait for the results and put them into the rows of the shard."""
        for view, copies in enumerate(self.copies):
            for rows, copy in zip(self.shard_rows, copies, strict=True):
                rows.finite[self.batch_rows] &= copy.finite()
                if self.of_views:
                    rows.features[self.batch_rows, view] = copy.rows()
                else:
                    rows.features[self.batch_rows] = copy.rows()


def _finish(running: Sequence[_PendingBatch]) -> None:
    for batch in running:
        batch.store()


def image_jobs(
    source: Inputs,
    targets: Sequence[ArrayTarget[ImageEncoder]],
    workers: int,
    views: Views | None,
    hang_seconds: float,
) -> list[ImageJob]:
    """Return one job for all arrays that are laid out alike: it decodes each image once."""
    jobs: list[ImageJob] = []
    for group in alike(
        targets,
        lambda target: (target.encoder.spec.resize, decode_device(target.record)),
    ):
        job = ImageJob(
            source=source,
            targets=tuple(group),
            workers=workers,
            views=views,
            hang_seconds=hang_seconds,
        )
        jobs.append(job)
    return jobs


def use_threads(layout: ArrayLayout) -> None:
    """Use as many threads as were recorded: the last bits of features depend on it."""
    torch.set_num_threads(layout.threads)


def alike(
    targets: Sequence[ArrayTarget[Encoder]],
    key_of: Callable[[ArrayTarget[Encoder]], object],
) -> list[list[ArrayTarget[Encoder]]]:
    """Group targets with the same key whose arrays have the same batches and shards."""
    groups: dict[object, list[ArrayTarget[Encoder]]] = {}
    for target in targets:
        layout = target.record.layout
        group_key = (
            key_of(target),
            layout.batch_size,
            layout.batch_tokens,
            layout.shard_rows,
            layout.threads,
            layout.compiled,
        )
        groups.setdefault(group_key, []).append(target)
    return list(groups.values())


def _by_module(targets: Sequence[ArrayTarget[Encoder]]) -> list[list[ArrayTarget[Encoder]]]:
    """Group targets whose encoders are cuts of one model."""
    groups: dict[int, list[ArrayTarget[Encoder]]] = {}
    for target in targets:
        groups.setdefault(id(target.encoder.module), []).append(target)
    return list(groups.values())


def encode_or_halve(
    encode: Callable[[Any], list[Tensor]],
    batch: Any,
    device: torch.device,
) -> list[Tensor]:
    """Return `encode(batch)`; when the device runs out of memory, encode in halves.

    Features then match to a cosine similarity of at least 0.99999, but not bitwise.

    Args:
        encode: encodes a batch, or any slice of it.
        batch: pixels, or token ids.
        device: of the encoder.
    """
    try:
        return encode(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    # Outside `except`: an exception keeps its frames, and so all tensors of the batch that failed.
    release_cached_memory(device)
    half = len(batch) // 2
    first_half = encode_or_halve(encode, batch[:half], device)
    second_half = encode_or_halve(encode, batch[half:], device)
    pairs = zip(first_half, second_half, strict=True)
    return [_joined(first, second) for first, second in pairs]


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Join the rows of both halves; tokens are padded with zeros to the longer of the two."""
    if first.ndim == 3 and first.shape[1] != second.shape[1]:
        n_tokens = max(first.shape[1], second.shape[1])
        first = _pad_tokens(first, n_tokens)
        second = _pad_tokens(second, n_tokens)
    return torch.cat([first, second])


def _pad_tokens(tokens: Tensor, n_tokens: int) -> Tensor:
    """[n, length, dim] -> [n, n_tokens, dim]."""
    return torch.nn.functional.pad(tokens, (0, 0, 0, n_tokens - tokens.shape[1]))
