"""Encoding one shard after another: the loop around the models.

Which rows share a batch is a pure function of (shard, batch size), image batches have one fixed
shape, a row that cannot be read keeps its place as a filler, and captions are sorted by length only
inside a shard. Several arrays of one modality are filled together: each image is decoded once, and
cuts of one model cost one forward pass.
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
from apecache.data.decoding import Preprocessed, preprocess_ahead, reading_ahead
from apecache.data.images import LoadedImage, load_as, load_image
from apecache.data.pairs import PairSource
from apecache.data.tensors import decode_tensor
from apecache.encoders.encoder import (
    ImageEncoder,
    TextEncoder,
    compile_images,
    encode_images,
    encode_texts,
)
from apecache.errors import RowError
from apecache.fingerprint import content_hash
from apecache.store.layout import ArrayLayout, ArrayRecord

Advance = Callable[[int], None]
"""Called with the number of rows of every encoded batch."""
Encoder = TypeVar("Encoder", ImageEncoder, TextEncoder, covariant=True)


@dataclass(frozen=True, kw_only=True)
class Target(Generic[Encoder]):
    """One array, and the encoder that fills it."""

    encoder: Encoder
    record: ArrayRecord


@dataclass(frozen=True, kw_only=True)
class EncodedShard:
    """Encoded rows of one shard: for each target float32 [n, *row_shape], and for all of them the
    input hashes, the rows that could not be encoded, and (texts) the number of tokens of each
    row."""

    features: tuple[NDArray[np.float32], ...]
    content: list[str]
    bad: dict[int, RowError]
    lengths: NDArray[np.int64] | None = None
    n_truncated: int = 0


@dataclass(frozen=True, kw_only=True)
class ImageJob:
    """Arrays of one source that are laid out alike, the same shards and batches, and resized alike.
    `workers` and `hang_seconds` as in `Ahead`."""

    source: PairSource
    targets: tuple[Target[ImageEncoder], ...]
    workers: int
    views: Views | None = None
    hang_seconds: float = 30.0

    @property
    def layout(self) -> ArrayLayout:
        return self.targets[0].record.layout

    def key(self, row: int) -> str:
        return self.source.pairs[row].key

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        """Decoding runs ahead of the models across batches and shards."""
        shards = [self.layout.shard(index) for index in indices]
        keys = [self.key(row) for rows in shards for row in rows]
        with self.decode(keys) as decoded:
            for rows in shards:
                use_threads(self.layout)
                yield self._encode(rows, decoded, advance)

    def decode(
        self,
        keys: Sequence[str],
    ) -> AbstractContextManager[Iterator[Preprocessed[list[Tensor]]]]:
        """What `preprocess` makes of each image, at most two batches in front of the consumer."""
        images = 2 * self.layout.batch_size + self.workers
        ahead = reading_ahead(
            self.source.media,
            workers=self.workers,
            images=images,
            hang_seconds=self.hang_seconds,
        )
        views = self.views.count if self.views else 1
        shapes = [(views, *first.encoder.input_shape) for first, *_ in self.models]
        return preprocess_ahead(
            keys,
            load=self.load,
            preprocess=self.preprocess,
            shapes=shapes,
            ahead=ahead,
        )

    def load(self, key: str) -> LoadedImage[Any]:
        """As a tensor for encoders that resize those; views are drawn from Pillow's images."""
        if self.targets[0].encoder.spec.resize == "torchvision" and not self.views:
            return load_as(decode_tensor, key, self.source.media)
        return load_image(key, self.source.media)

    def preprocess(self, loaded: LoadedImage[Any]) -> list[Tensor]:
        """For each model the pixels of one image, float32 [views, 3, height, width]; one view if
        there are none."""
        images = self.views.of(loaded.image, loaded.digest) if self.views else [loaded.image]
        return [
            torch.stack([first.encoder.preprocess(i) for i in images]) for first, *_ in self.models
        ]

    @property
    def models(self) -> list[list[Target[ImageEncoder]]]:
        return _by_model(self.targets)

    @cached_property
    def passes(self) -> list[Callable[[Tensor], list[Tensor]]]:
        """For each model one forward pass, for all of its cuts."""
        cuts = [[target.encoder for target in targets] for targets in self.models]
        return [
            compile_images(c) if self.layout.compiled else partial(encode_images, c) for c in cuts
        ]

    def _encode(
        self,
        rows: range,
        decoded: Iterator[Preprocessed[list[Tensor]]],
        advance: Advance,
    ) -> EncodedShard:
        size = self.layout.batch_size
        shape = (len(rows), *((self.views.count,) if self.views else ()))
        features = {
            id(t): np.zeros((*shape, *t.encoder.row_shape), np.float32) for t in self.targets
        }
        content = [""] * len(rows)
        bad = dict[int, RowError]()
        buffers = [
            _PixelBuffers(targets, size, self.views.count if self.views else 1)
            for targets in self.models
        ]
        late: list[_Late] = []
        for begin in range(0, len(rows), size):
            count = min(size, len(rows) - begin)
            pixels = [buffer.next() for buffer in buffers]
            for slot in range(count):
                row = next(decoded)
                content[begin + slot] = row.digest
                for buffer, value in zip(pixels, row.value or (), strict=row.value is not None):
                    buffer[slot] = value
                if row.error is not None:
                    bad[begin + slot] = row.error
            given = zip(self.models, self.passes, pixels, strict=True)
            started = [
                _Late(targets, encode=encode, begin=begin, count=count, pixels=batch)
                for targets, encode, batch in given
            ]
            _finish(late, features)  # the results of the batch before, while this one is on its way
            late = started
            advance(count)
        _finish(late, features)
        return EncodedShard(
            features=tuple(features[id(target)] for target in self.targets),
            content=content,
            bad=bad,
        )


class _PixelBuffers:
    """Two batches of pixels of one model, pinned for CUDA: one is filled while the other is copied
    and encoded."""

    def __init__(self, targets: Sequence[Target[ImageEncoder]], size: int, views: int) -> None:
        encoder = targets[0].encoder
        pinned = encoder.device.type == "cuda"
        shape = (size, views, *encoder.input_shape)
        self.buffers = [torch.zeros(shape, pin_memory=pinned) for _ in range(2 if pinned else 1)]
        self.turn = 0

    def next(self) -> Tensor:
        self.turn += 1
        return self.buffers[self.turn % len(self.buffers)].zero_()


class _Late:
    """A batch that has been given to a model, and whose results are fetched when the next one has
    been given too."""

    def __init__(
        self,
        targets: Sequence[Target[ImageEncoder]],
        encode: Callable[[Tensor], list[Tensor]],
        begin: int,
        count: int,
        pixels: Tensor,
    ) -> None:
        self.targets = targets
        self.begin = begin
        self.count = count
        self.results = [encode_or_halve(encode, pixels[:, view]) for view in range(pixels.shape[1])]

    def store(self, features: dict[int, NDArray[np.float32]]) -> None:
        for place, target in enumerate(self.targets):
            out = features[id(target)][self.begin : self.begin + self.count]
            for view, results in enumerate(self.results):
                found = results[place][: self.count].cpu().numpy()
                if target.record.layout.views:
                    out[:, view] = found
                else:
                    out[:] = found


def _finish(late: Sequence[_Late], features: dict[int, NDArray[np.float32]]) -> None:
    for batch in late:
        batch.store(features)


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """Arrays of one source that are laid out alike, all of cuts of one model."""

    source: PairSource
    targets: tuple[Target[TextEncoder], ...]

    @property
    def layout(self) -> ArrayLayout:
        return self.targets[0].record.layout

    def key(self, row: int) -> str:
        return self.source.pairs[self.source.image_rows[row]].key

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        for index in indices:
            rows = self.layout.shard(index)
            use_threads(self.layout)
            yield self._encode(self.source.captions[rows.start : rows.stop], advance)

    def _encode(self, texts: list[str], advance: Advance) -> EncodedShard:
        bad = {row: error for row, text in enumerate(texts) if (error := caption_error(text))}
        good = [row for row in range(len(texts)) if row not in bad]
        encoders = [target.encoder for target in self.targets]
        tokens = encoders[0].tokenise([texts[row] for row in good])
        order = sorted(range(len(good)), key=lambda i: (len(tokens.ids[i]), i))
        features = [
            np.zeros((len(texts), *target.record.layout.row_shape), np.float32)
            for target in self.targets
        ]
        lengths = np.zeros(len(texts), np.int64)
        lengths[good] = [len(ids) for ids in tokens.ids]
        size = self.layout.batch_size
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            rows = [good[i] for i in batch]
            encoded = encode_or_halve(
                lambda ids: encode_texts(encoders, ids),
                [tokens.ids[i] for i in batch],
            )
            for out, found in zip(features, encoded, strict=True):
                place = (rows, slice(found.shape[1])) if out.ndim == 3 else rows
                out[place] = found.cpu().numpy()
            advance(len(batch))
        advance(len(bad))
        content = [content_hash(text) for text in texts]
        return EncodedShard(
            features=tuple(features),
            content=content,
            bad=bad,
            lengths=lengths,
            n_truncated=tokens.n_truncated,
        )


def image_jobs(
    source: PairSource,
    targets: Sequence[Target[ImageEncoder]],
    workers: int,
    views: Views | None,
    hang_seconds: float,
) -> list[ImageJob]:
    """One for all arrays that are laid out alike: images are decoded once for all of them."""
    groups = _alike(targets, lambda target: target.encoder.spec.resize)
    return [
        ImageJob(
            source=source,
            targets=tuple(group),
            workers=workers,
            views=views,
            hang_seconds=hang_seconds,
        )
        for group in groups
    ]


def text_jobs(source: PairSource, targets: Sequence[Target[TextEncoder]]) -> list[TextJob]:
    """One for all cuts of one model."""
    return [
        TextJob(source=source, targets=tuple(group))
        for group in _alike(targets, lambda target: id(target.encoder.module))
    ]


def use_threads(layout: ArrayLayout) -> None:
    """As many as were recorded: the last bits of features depend on it."""
    torch.set_num_threads(layout.threads)


def _alike(
    targets: Sequence[Target[Encoder]],
    kind: Callable[[Target[Encoder]], object],
) -> list[list[Target[Encoder]]]:
    """Targets of the same kind whose arrays have the same batches and shards, together."""
    groups: dict[object, list[Target[Encoder]]] = {}
    for target in targets:
        layout = target.record.layout
        alike = (
            kind(target),
            layout.batch_size,
            layout.shard_rows,
            layout.threads,
            layout.compiled,
        )
        groups.setdefault(alike, []).append(target)
    return list(groups.values())


def _by_model(targets: Sequence[Target[Encoder]]) -> list[list[Target[Encoder]]]:
    """Targets whose encoders are cuts of one model, together."""
    groups: dict[int, list[Target[Encoder]]] = {}
    for target in targets:
        groups.setdefault(id(target.encoder.module), []).append(target)
    return list(groups.values())


def caption_error(text: str) -> RowError | None:
    if not text.strip():
        return RowError("empty", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return RowError("not-unicode", "the caption has a lone surrogate")
    return None


def encode_or_halve(encode: Callable[[Any], list[Tensor]], batch: Any) -> list[Tensor]:
    """`encode(batch)`; when the device runs out of memory, in halves (equal then to cosine 0.99999,
    not bit by bit)."""
    try:
        return encode(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        halves = encode_or_halve(encode, batch[:half]), encode_or_halve(encode, batch[half:])
        return [_joined(*parts) for parts in zip(*halves, strict=True)]


def _joined(first: Tensor, second: Tensor) -> Tensor:
    """Rows of both; tokens are padded with zeros to the longer of the two."""
    if first.ndim == 3 and first.shape[1] != second.shape[1]:
        longest = max(first.shape[1], second.shape[1])
        first, second = (
            torch.nn.functional.pad(x, (0, 0, 0, longest - x.shape[1])) for x in (first, second)
        )
    return torch.cat([first, second])
