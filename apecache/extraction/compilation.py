"""Decide whether an image encoder is compiled: as asked for, or where it is measured to pay."""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from apecache.device import timed_seconds
from apecache.encoders.encoder import ImageEncoder, TextEncoder, compile_images, encode_images
from apecache.errors import EncoderError, OptionError, one_line
from apecache.extraction.encode import encode_or_halve
from apecache.store.layout import ArrayLayout

COMPILE_FROM_ROWS = 4096
COMPILE_FROM_SECONDS = 600
COMPILED_SHARE = 0.9


def decide_compiled(
    encoders: Sequence[ImageEncoder | TextEncoder],
    rows: int,
    batch: int,
    requested: bool | None,
) -> bool:
    """Decide whether compiled models fill new arrays; see `ExtractSpec.compiled`.

    Args:
        requested: what the user asked for, or None.

    Raises:
        OptionError: compilation is asked for, but a cut is after a block.
    """
    # Only images: batches of texts differ in shape, and each shape would be compiled.
    images = [encoder for encoder in encoders if isinstance(encoder, ImageEncoder)]
    can_compile = bool(images) and all(encoder.spec.layer is None for encoder in images)
    if requested and images and not can_compile:
        raise OptionError(
            "--compile: a cut after a block (@LAYER) is caught by hooks and not compiled; "
            "leave it out"
        )
    if requested is not None or not can_compile or rows < COMPILE_FROM_ROWS:
        return bool(requested) and can_compile
    models = list({id(encoder.module): encoder for encoder in images}.values())
    eager_seconds = 0.0
    for encoder in models:
        eager_seconds += _seconds(partial(encode_images, [encoder]), encoder, batch)
    if eager_seconds * rows / batch < COMPILE_FROM_SECONDS:
        return False
    try:
        compiled_seconds = 0.0
        for encoder in models:
            compiled_seconds += _seconds(compile_images([encoder]), encoder, batch)
    except (RuntimeError, OSError):
        # This machine has no compiler, or the model has an operation that it does not know.
        return False
    return compiled_seconds < COMPILED_SHARE * eager_seconds


def _require_compiler(
    encoders: Sequence[ImageEncoder | TextEncoder],
    layouts: Sequence[ArrayLayout],
) -> None:
    """Compile the models that will run compiled, before anything is written.

    Raises:
        EncoderError: a model cannot be compiled on this machine.
    """
    for encoder, layout in zip(encoders, layouts, strict=True):
        if layout.compiled and isinstance(encoder, ImageEncoder):
            try:
                pixels = torch.zeros(layout.batch_size, *encoder.input_shape)
                encode_or_halve(compile_images([encoder]), pixels, encoder.device)
            except (RuntimeError, OSError) as error:
                raise EncoderError(
                    f"encoder {encoder.spec} cannot be compiled here ({one_line(error)}); install "
                    "a C++ compiler, or "
                    "make another --store with --no-compile"
                ) from None


def _seconds(
    encode: Callable[[torch.Tensor], list[torch.Tensor]],
    encoder: ImageEncoder,
    batch: int,
) -> float:
    """Time one batch in seconds, results included."""
    pixels = torch.zeros(batch, *encoder.input_shape)
    run = partial(encode_or_halve, encode, pixels, encoder.device)
    # The first batch compiles and warms up; only the second one counts.
    run()
    return timed_seconds(run, encoder.device)
