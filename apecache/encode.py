"""Encoding one shard after another: the loop around the model.

Which rows share a batch is a pure function of (shard, batch size), image batches have one fixed shape, a row that
cannot be read keeps its place as a filler, and captions are sorted by length only inside a shard.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.data.images import Preprocessed, preprocess_ahead
from apecache.data.pairs import PairSource
from apecache.encoders.encoder import ImageEncoder, TextEncoder
from apecache.errors import RowError
from apecache.fingerprint import content_hash
from apecache.store.layout import ArrayRecord

Advance = Callable[[int], None]
"""Called with the number of rows of every encoded batch."""


@dataclass(frozen=True)
class EncodedShard:
    """Encoded rows of one shard: float32 [n, dim], input hashes, and the rows that could not be encoded."""

    features: NDArray[np.float32]
    content: list[str]
    bad: dict[int, RowError]
    n_truncated: int = 0


@dataclass(frozen=True)
class ImageJob:
    source: PairSource
    encoder: ImageEncoder
    record: ArrayRecord
    workers: int

    def key(self, row: int) -> str:
        return self.source.pairs[row].key

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        """Decoding runs ahead of the model across batches and shards."""
        shards = [self.record.layout.shard(index) for index in indices]
        keys = [self.key(row) for rows in shards for row in rows]
        ahead = 2 * self.record.layout.batch_size + self.workers
        with preprocess_ahead(keys, self.source.media, self.encoder.preprocess, self.workers, ahead) as decoded:
            for rows in shards:
                yield self._encode(rows, decoded, advance)

    def _encode(self, rows: range, decoded: Iterator[Preprocessed[Tensor]], advance: Advance) -> EncodedShard:
        size = self.record.layout.batch_size
        features = np.zeros((len(rows), self.encoder.dim), np.float32)
        content, bad = [""] * len(rows), {}
        pixels = torch.zeros(size, *self.encoder.input_shape, pin_memory=self.encoder.device.type == "cuda")
        for begin in range(0, len(rows), size):
            count = min(size, len(rows) - begin)
            pixels.zero_()
            for slot in range(count):
                row = next(decoded)
                content[begin + slot] = row.digest
                if row.value is not None:
                    pixels[slot] = row.value
                elif row.error is not None:
                    bad[begin + slot] = row.error
            features[begin : begin + count] = encode_or_halve(self.encoder.encode, pixels)[:count].numpy()
            advance(count)
        return EncodedShard(features, content, bad)


@dataclass(frozen=True)
class TextJob:
    source: PairSource
    encoder: TextEncoder
    record: ArrayRecord

    def key(self, row: int) -> str:
        return self.source.pairs[self.source.image_rows[row]].key

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        for index in indices:
            rows = self.record.layout.shard(index)
            yield self._encode(self.source.captions[rows.start : rows.stop], advance)

    def _encode(self, texts: list[str], advance: Advance) -> EncodedShard:
        bad = {row: error for row, text in enumerate(texts) if (error := caption_error(text))}
        good = [row for row in range(len(texts)) if row not in bad]
        tokens = self.encoder.tokenise([texts[row] for row in good])
        order = sorted(range(len(good)), key=lambda i: (len(tokens.ids[i]), i))
        features = np.zeros((len(texts), self.encoder.dim), np.float32)
        size = self.record.layout.batch_size
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            encoded = encode_or_halve(self.encoder.encode_ids, [tokens.ids[i] for i in batch])
            features[[good[i] for i in batch]] = encoded.numpy()
            advance(len(batch))
        advance(len(bad))
        return EncodedShard(features, [content_hash(text) for text in texts], bad, tokens.n_truncated)


def caption_error(text: str) -> RowError | None:
    if not text.strip():
        return RowError("empty", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return RowError("not-unicode", "the caption has a lone surrogate")
    return None


def encode_or_halve(encode: Callable[[Any], Tensor], batch: Any) -> Tensor:
    """`encode(batch)`; when the device runs out of memory, in halves (equal then to cosine 0.99999, not bit by bit)."""
    try:
        return encode(batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
        torch.cuda.empty_cache()
        half = len(batch) // 2
        return torch.cat([encode_or_halve(encode, batch[:half]), encode_or_halve(encode, batch[half:])])
