"""Decode JPEG files on a CUDA device, one batch at a time.

nvJPEG gives other pixels than the decoders of the CPU, so features have a fingerprint of their own.
Threads read the files. They decode what is no plain JPEG, by the rule of `apecache.data.tensors`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Literal

import torch
import torchvision.io
from torch import Tensor

from apecache.data.decoding import Decode, Preprocessed, open_threads
from apecache.data.images import HIDE_WARNINGS, LoadedImage, load_as
from apecache.data.media import Media
from apecache.data.pixels import PixelRules
from apecache.data.tensors import decode_tensor, plain_jpeg_or_pixels
from apecache.encoders.encoder import ImageEncoder
from apecache.errors import OptionError, RowError
from apecache.store.layout import ArrayLayout, ArrayRecord

DecodeDevice = Literal["cpu", "cuda"]
"""Where JPEG files are decoded."""
READING_THREADS = 16


def decode_device(record: ArrayRecord) -> DecodeDevice:
    """Return where the images of an array are decoded."""
    return "cuda" if record.fingerprint.fields.get("decode") == "cuda" else "cpu"


def can_decode_on(device: torch.device) -> bool:
    """Return whether torchvision decodes JPEG files on a device."""
    return device.type == "cuda" and hasattr(torchvision.io, "decode_jpeg")


def require_device_decoding(encoder: ImageEncoder, of_views: bool) -> None:
    """Refuse to decode on a device what cannot be decoded there.

    Raises:
        OptionError: the encoder is not on CUDA, it resizes Pillow's images, or views are drawn.
    """
    if not can_decode_on(encoder.device):
        raise OptionError(
            f"--decode cuda: expected a CUDA device, found {encoder.device}; use --device cuda on "
            "a machine with CUDA, or another --store with --decode cpu"
        )
    if of_views:
        raise OptionError(
            "--decode cuda: augmented views are drawn from Pillow's images; leave --decode out"
        )
    if encoder.spec.resize != "torchvision" or encoder.pixel_preprocess is None:
        raise OptionError(
            f"--decode cuda: {encoder.spec} resizes Pillow's images; add --resize torchvision"
        )


@contextmanager
def open_device_decoders(
    keys: Sequence[str],
    media: Media,
    rules: PixelRules | None,
    encoders: Sequence[ImageEncoder],
    layout: ArrayLayout,
) -> Iterator[Decode]:
    """Start threads that read files, and decode each batch of them on the device.

    Args:
        keys: the images.
        media: reads them.
        rules: how files become pixels; None for those of the media.
        encoders: one of each model; its preprocessing runs on the device.
        layout: of the arrays, which says what is a batch.
    """
    device = encoders[0].device

    def load(key: str) -> LoadedImage[Tensor]:
        return load_as(plain_jpeg_or_pixels, key, media, rules)

    def preprocess(pixels: Tensor) -> list[Tensor]:
        pixels_by_model: list[Tensor] = []
        for encoder in encoders:
            in_two_steps = encoder.pixel_preprocess
            assert in_two_steps is not None
            # One view of each image.
            pixels_by_model.append(in_two_steps.pixels(pixels)[None])
        return pixels_by_model

    def batch_of(row: int) -> tuple[int, int]:
        shard, row_in_shard = divmod(row, layout.shard_rows)
        return shard, row_in_shard // layout.batch_size

    with open_threads(
        keys,
        load=load,
        preprocess=lambda loaded: loaded.image,
        threads=READING_THREADS,
        ahead=2 * layout.batch_size + READING_THREADS,
    ) as read:

        def decode(rows: Sequence[int]) -> Iterator[Preprocessed[list[Tensor]]]:
            files = read(rows)
            # Images of one batch are decoded together, whichever shards a run encodes.
            for _, batch in groupby(rows, key=batch_of):
                batch_rows = list(batch)
                batch_keys = [keys[row] for row in batch_rows]
                batch_files = [next(files) for _ in batch_rows]
                yield from _decoded(batch_keys, batch_files, device, preprocess)

        yield decode


def _decoded(
    keys: Sequence[str],
    files: Sequence[Preprocessed[Tensor]],
    device: torch.device,
    preprocess: Callable[[Tensor], list[Tensor]],
) -> Iterator[Preprocessed[list[Tensor]]]:
    """Decode and preprocess the images of one batch."""
    jpegs = [file.value for file in files if file.value is not None and _is_file(file.value)]
    decoded = iter(_decode_jpegs(jpegs, device))
    for key, file in zip(keys, files, strict=True):
        value: list[Tensor] | None = None
        error = file.error
        try:
            if file.value is not None:
                pixels = next(decoded) if _is_file(file.value) else file.value
                if pixels is None:
                    pixels = decode_tensor(file.value.numpy().tobytes(), key)
                value = preprocess(pixels.to(device, non_blocking=True))
        except RowError as refusal:
            error = refusal
        yield Preprocessed(value=value, digest="" if error else file.digest, error=error)


def _is_file(data: Tensor) -> bool:
    """Return whether this is a file's bytes [n], and not its pixels [3, height, width]."""
    return data.ndim == 1


def _decode_jpegs(files: list[Tensor], device: torch.device) -> list[Tensor | None]:
    """Decode JPEG files on the device; None for those that it refuses."""
    if not files:
        return []
    try:
        # torchvision calls its decoders deprecated, which no user of this one can change.
        with HIDE_WARNINGS:
            decoded: list[Tensor | None] = torchvision.io.decode_jpeg(files, "RGB", device)
        return decoded
    except RuntimeError:
        if len(files) == 1:
            return [None]
    # The error does not say which file it was.
    return [pixels for file in files for pixels in _decode_jpegs([file], device)]
