"""Encode captions, one shard after another.

Captions are sorted by length, but only inside a shard, and divided into batches of at most so many
captions and so many tokens, padding included. Which captions share a batch depends on the shard and
on the array's layout only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from torch import Tensor

from apecache.encoders.encoder import (
    TextEncoder,
    TextPass,
    bucket_length,
    compile_texts,
    encode_texts,
)
from apecache.errors import RowError
from apecache.extraction.encode import (
    Advance,
    ArrayTarget,
    EncodedShard,
    RowCopy,
    ShardRows,
    alike,
    encode_or_halve,
    use_threads,
)
from apecache.extraction.segments import Inputs
from apecache.fingerprint import content_hash
from apecache.store.layout import ArrayLayout


@dataclass(frozen=True, kw_only=True)
class CaptionBatch:
    """Name the captions of one batch."""

    captions: range
    """Positions in the order by length."""
    length: int
    """Tokens that every caption is padded to."""
    n_slots: int
    """Captions of the batch with fillers, which give compiled models batches of one shape."""


def divide_captions(
    lengths: Sequence[int],
    layout: ArrayLayout,
    encoder: TextEncoder,
) -> Iterator[CaptionBatch]:
    """Divide captions into batches of at most `batch_size` captions and `batch_tokens` tokens.

    Padding counts as tokens. A caption that is longer than `batch_tokens` is a batch of its own.

    Args:
        lengths: tokens of each caption, in increasing order.
        layout: of the array.
        encoder: says how far a batch is padded.
    """
    begin = 0
    while begin < len(lengths):
        length = _padded(lengths[begin], layout, encoder)
        end = begin + 1
        while end < len(lengths) and end - begin < layout.batch_size:
            next_length = _padded(lengths[end], layout, encoder)
            if (end + 1 - begin) * next_length > (layout.batch_tokens or np.inf):
                break
            # A compiled model takes batches of one length.
            if layout.compiled and next_length != length:
                break
            length = next_length
            end += 1
        n_slots = end - begin
        if layout.compiled:
            most_captions = (layout.batch_tokens or layout.batch_size * length) // length
            n_slots = max(1, min(layout.batch_size, most_captions))
        yield CaptionBatch(captions=range(begin, end), length=length, n_slots=n_slots)
        begin = end


def _padded(length: int, layout: ArrayLayout, encoder: TextEncoder) -> int:
    """Return the tokens that a caption is padded to if it is the longest of its batch."""
    padded = max(length, encoder.length or 1)
    if not layout.compiled:
        return padded
    return bucket_length(padded, encoder.max_tokens)


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """Encode the captions of one source into arrays with the same shards and batches.

    They hold different cuts (layers or poolings) of one model.
    """

    source: Inputs
    targets: tuple[ArrayTarget[TextEncoder], ...]

    @property
    def layout(self) -> ArrayLayout:
        return self.targets[0].record.layout

    @cached_property
    def encode(self) -> TextPass:
        """Return the forward pass for all cuts."""
        encoders = [target.encoder for target in self.targets]
        if self.layout.compiled:
            return compile_texts(encoders)
        return partial(encode_texts, encoders)

    def key(self, row: int) -> str:
        image_row = self.source.image_rows[row]
        # A block may have a caption without its image.
        return self.source.keys[image_row] if image_row >= 0 else ""

    def shards(self, indices: Sequence[int], advance: Advance) -> Iterator[EncodedShard]:
        """Encode shards one by one; see `ImageJob.shards`."""
        for index in indices:
            rows = self.layout.shard(index)
            use_threads(self.layout)
            yield self._encode(self.source.captions[rows.start : rows.stop], advance)

    def _encode(self, texts: list[str], advance: Advance) -> EncodedShard:
        """Encode the captions of one shard."""
        bad: dict[int, RowError] = {}
        good_rows: list[int] = []
        for row, text in enumerate(texts):
            error = caption_error(text)
            if error:
                bad[row] = error
            else:
                good_rows.append(row)
        encoder = self.targets[0].encoder
        tokens = encoder.tokenize([texts[row] for row in good_rows])
        # Captions of like length share a batch, so that little is padded.
        order = sorted(range(len(good_rows)), key=lambda i: (len(tokens.ids[i]), i))
        shard_rows = [ShardRows(len(texts), target.record.layout) for target in self.targets]
        lengths = np.zeros(len(texts), np.int64)
        lengths[good_rows] = [len(ids) for ids in tokens.ids]
        running: _PendingTexts | None = None
        sorted_lengths = [len(tokens.ids[i]) for i in order]
        for batch in divide_captions(sorted_lengths, self.layout, encoder):
            positions = [order[i] for i in batch.captions]
            ids = [tokens.ids[i] for i in positions]
            # Fillers repeat a caption: a model may give NaN for a row without tokens.
            fillers = [ids[-1]] * (batch.n_slots - len(ids))
            encoded = encode_or_halve(
                partial(self.encode, length=batch.length),
                ids + fillers,
                encoder.device,
            )
            started = _PendingTexts([good_rows[i] for i in positions], shard_rows, encoded)
            # Fetch the results of the batch before while the device computes this one.
            if running is not None:
                running.store()
            running = started
            advance(len(positions))
        if running is not None:
            running.store()
        advance(len(bad))
        content = [content_hash(text) for text in texts]
        return EncodedShard(
            features=tuple(rows.features for rows in shard_rows),
            finite=tuple(rows.finite for rows in shard_rows),
            content=content,
            bad=bad,
            lengths=lengths,
            n_truncated=tokens.n_truncated,
        )


class _PendingTexts:
    """Copy the results of a batch; they are fetched once the next batch has been started."""

    def __init__(
        self,
        rows: list[int],
        shard_rows: Sequence[ShardRows],
        encoded: Sequence[Tensor],
    ) -> None:
        self.rows = rows
        self.shard_rows = shard_rows
        self.copies: list[RowCopy] = []
        for target_rows, features in zip(shard_rows, encoded, strict=True):
            if features.ndim == 3:
                # Tokens beyond the width of the array are padding.
                features = features[:, : target_rows.features.shape[1]]
            self.copies.append(target_rows.copy_of(features[: len(rows)]))

    def store(self) -> None:
        """Wait for the results and put them into the rows of the shard."""
        for target_rows, copy in zip(self.shard_rows, self.copies, strict=True):
            target_rows.finite[self.rows] = copy.finite()
            features = copy.rows()
            # Tokens [n, longest, dim] are narrower than their array.
            is_tokens = features.ndim == 3
            destination = (self.rows, slice(features.shape[1])) if is_tokens else self.rows
            target_rows.features[destination] = features


def text_jobs(source: Inputs, targets: Sequence[ArrayTarget[TextEncoder]]) -> list[TextJob]:
    """Return one job for all cuts of one model."""
    groups = alike(targets, lambda target: id(target.encoder.module))
    return [TextJob(source=source, targets=tuple(group)) for group in groups]


def caption_error(text: str) -> RowError | None:
    """Return why a caption cannot be encoded, or None."""
    if not text.strip():
        return RowError("empty", "the caption is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        return RowError("not-unicode", "the caption has a lone surrogate")
    return None
