"""Decide whether encoders are compiled: as asked for, or images where it is measured to pay."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from apecache.device import timed_seconds
from apecache.encoders.encoder import (
    ImageEncoder,
    TextEncoder,
    compile_images,
    compile_texts,
    encode_images,
)
from apecache.errors import EncoderError, OptionError, one_line
from apecache.extraction.encode import encode_or_halve
from apecache.extraction.encode_texts import divide_captions
from apecache.store.layout import ArrayLayout

COMPILE_FROM_ROWS = 4096
COMPILE_FROM_SECONDS = 600
COMPILED_SHARE = 0.9
COMPILER_ERRORS = (RuntimeError, OSError)
"""This machine has no compiler, or the model has an operation that it does not know."""


def decide_compiled(
    encoders: Sequence[ImageEncoder | TextEncoder],
    layout: ArrayLayout,
    requested: bool | None,
) -> bool:
    """Decide whether compiled models fill new arrays; see `ExtractSpec.compiled`.

    Args:
        encoders: of one modality.
        layout: one of theirs.
        requested: what the user asked for, or None.

    Raises:
        OptionError: compilation is asked for, but a cut is after a block.
    """
    rows = layout.rows
    batch = layout.batch_size
    texts = [encoder for encoder in encoders if isinstance(encoder, TextEncoder)]
    if texts:
        return bool(requested) and _can_compile(texts, layout)
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
    except COMPILER_ERRORS:
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
        if layout.compiled:
            try:
                _run_compiled(encoder, layout)
            except COMPILER_ERRORS as error:
                raise EncoderError(
                    f"encoder {encoder.spec} cannot be compiled here ({one_line(error)}); install "
                    "a C++ compiler, or "
                    "make another --store with --no-compile"
                ) from None


def _can_compile(texts: Sequence[TextEncoder], layout: ArrayLayout) -> bool:
    """Return whether text encoders can be compiled; if not, they run as they are."""
    if any(encoder.spec.layer is not None for encoder in texts):
        return False
    try:
        for encoder in texts:
            _run_compiled(encoder, replace(layout, compiled=True))
    except COMPILER_ERRORS:
        return False
    return True


def _run_compiled(encoder: ImageEncoder | TextEncoder, layout: ArrayLayout) -> None:
    """Compile an encoder and run it on one batch of black images or of a short text."""
    if isinstance(encoder, ImageEncoder):
        pixels = torch.zeros(layout.batch_size, *encoder.input_shape)
        encode_or_halve(compile_images([encoder]), pixels, encoder.device)
        return
    (ids,) = encoder.tokenize(["a"]).ids
    (batch,) = divide_captions([len(ids)], layout, encoder)
    encode = partial(compile_texts([encoder]), length=batch.length)
    encode_or_halve(encode, [ids] * batch.n_slots, encoder.device)


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
