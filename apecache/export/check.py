"""Compare an exported model with the run on a few pictures and texts, before anybody uses it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from apecache.errors import RunError
from apecache.export.whole_model import WholeModel

TOLERANCE = 1e-4
"""Largest difference of a value of an embedding of length 1: rounding is below 1e-5."""
RESIZE_TOLERANCE = 0.05
"""Where the run resizes on tensors, and the other library with Pillow."""
HALF_TOLERANCE = 0.02
"""Where the exported weights are float16."""
INT8_TOLERANCE = 2.0
"""Where they are int8: no two vectors of length 1 differ by more. The difference is only shown, as
it depends on the model; NaN is refused."""
PROBE_SIZES = ((64, 48), (48, 64), (90, 40))
"""(width, height) of the pictures."""
PROBE_TEXTS = ("a", "a photo of two dogs in the snow", "Ein Haus am See, 1 + 1 = 2!", "a b " * 200)


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """Hold the functions by which another library embeds, as float [n, dim]."""

    encode_image: Callable[[Sequence[Image.Image]], Tensor] | None
    """None: the format holds no image side."""
    encode_text: Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExportDifference:
    """Hold the largest absolute differences between exported and original embeddings."""

    image: float | None
    text: float


def compare_exported(
    exported: ExportedModel,
    model: WholeModel,
    tolerance: float = TOLERANCE,
) -> ExportDifference:
    """Embed probes by both and compare.

    Raises:
        RunError: they differ by more than the tolerance.
    """
    images = probe_images()
    image_difference = None
    if exported.encode_image is not None:
        # Two ways to resize differ by some levels of gray, which small models amplify.
        is_resized = model.image.encoder.spec.resize != "reference"
        limit = max(tolerance, RESIZE_TOLERANCE) if is_resized else tolerance
        embedded = exported.encode_image(images)
        image_difference = _difference(embedded, model.encode_image(images), "image", limit)
    embedded = exported.encode_text(PROBE_TEXTS)
    text_difference = _difference(embedded, model.encode_text(PROBE_TEXTS), "text", tolerance)
    return ExportDifference(image=image_difference, text=text_difference)


def probe_images() -> list[Image.Image]:
    """Return seeded RGB pictures, smooth and with noise, of several proportions."""
    chance = np.random.default_rng(0)
    images = []
    # Pictures of several proportions: a wrong crop or squash shows only on those.
    for width, height in PROBE_SIZES:
        coarse = chance.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = chance.integers(-20, 21, (height, width, 3))
        pixels = np.clip(np.asarray(smooth).astype(np.int64) + noise, 0, 255)
        images.append(Image.fromarray(pixels.astype(np.uint8)))
    return images


def _difference(embedded: Tensor, expected: Tensor, side: str, tolerance: float) -> float:
    if embedded.shape != expected.shape:
        raise RunError(
            f"the exported {side} side gives {list(embedded.shape)}, the run "
            f"{list(expected.shape)}; nothing was written"
        )
    difference = float((embedded.float() - expected).abs().max())
    # NaN fails this comparison too.
    if not difference <= tolerance:
        raise RunError(
            f"the exported {side} side differs from the run by {difference:.2g}, more than "
            f"{tolerance:.0e}, so this format cannot hold this encoder; nothing was written. "
            "Export with --to onnx, or use apecache.load"
        )
    return difference
