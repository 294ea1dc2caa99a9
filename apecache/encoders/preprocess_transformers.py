"""Turn images into pixels by the image processors of transformers, at their size or another one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from apecache.encoders.library_types import Processor
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError

PROBE_SIZES = ((640, 480), (480, 640), (900, 130))
"""(width, height) of images whose pixels must have one shape."""


@dataclass(frozen=True, kw_only=True)
class ProcessorPreprocess:
    """Call the library's own image processor, with the options that give another size."""

    processor: Processor
    size: dict[str, Any]

    def __call__(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [3, height, width]."""
        processed = self.processor(images=image, return_tensors="pt", **self.size)
        pixels: Tensor = processed["pixel_values"][0]
        return pixels


def fixed_shape(
    preprocess: ProcessorPreprocess,
    spec: EncoderSpec,
    sizes: Sequence[tuple[int, int]] = PROBE_SIZES,
) -> tuple[int, int, int]:
    """Return (3, height, width) of the pixels of every image.

    The processor's files name its size in several ways, so images of several shapes tell it.

    Raises:
        EncoderError: pixels of images with other proportions have another shape.
    """
    shapes = {tuple(preprocess(Image.new("RGB", size)).shape) for size in sizes}
    if len(shapes) > 1:
        raise EncoderError(
            f"encoder {spec}: its processor resizes without cropping, so its pixels have no fixed "
            "shape; write do_center_crop and crop_size to its preprocessor_config.json"
        )
    channels, height, width = shapes.pop()
    return int(channels), int(height), int(width)


def resize_options(processor: Processor, spec: EncoderSpec) -> dict[str, Any]:
    """Return the call options for `spec.resolution` pixels, with the processor's own geometry.

    What is squashed to a square stays squashed, what is cropped keeps its crop ratio.

    Raises:
        EncoderError: the processor's pixels are not square, so one number says no size.
    """
    resolution = spec.resolution
    if resolution is None:
        return {}
    size = dict(processor.size or {})
    side = {"height": resolution, "width": resolution}
    if not getattr(processor, "do_center_crop", False):
        _require_square(size, spec)
        # Without a crop the shorter edge leaves the shape open, which `fixed_shape` refuses.
        return {"size": {"shortest_edge": resolution} if "shortest_edge" in size else side}
    crop_size = dict(processor.crop_size)
    _require_square(crop_size, spec)
    crop_edge = crop_size["height"]
    if "shortest_edge" in size:
        # The same share of the image is cropped away as at the processor's own resolution.
        new_edge = round(size["shortest_edge"] * resolution / crop_edge)
        return {"size": {"shortest_edge": new_edge}, "crop_size": side}
    _require_square(size, spec)
    resize_edge = size.get("height") or crop_edge
    new_edge = round(resize_edge * resolution / crop_edge)
    return {"size": {"height": new_edge, "width": new_edge}, "crop_size": side}


def _require_square(size: dict[str, Any], spec: EncoderSpec) -> None:
    if size.get("height") != size.get("width"):
        raise EncoderError(
            f"encoder {spec}: its processor gives {size.get('height')} x {size.get('width')} "
            "pixels, not a square; leave --resolution off"
        )
