"""From an RGB image to the numbers that a model takes, by the model's own reference or, asked for,
faster."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from apecache.encoders.encoder import TORCH_DTYPES
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError
from apecache.fingerprint import IMAGE_DECODING, Json

Preprocess = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorPreprocess:
    """Shorter side to `edge`, crop `crop` (height, width) from the middle, scale to 0..1, subtract
    `mean`, divide by `std`: on uint8 tensors [3, height, width] until the crop is done. The share
    of values that differ from Pillow's by one to two in 255 is what benchmarks/speed/extract
    prints."""

    edge: int
    crop: tuple[int, int]
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor | Image.Image) -> Tensor:
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        resized = F.resize(
            pixels,
            [self.edge],
            interpolation=InterpolationMode(self.interpolation),
            antialias=True,
        )
        scaled = F.to_dtype(F.center_crop(resized, list(self.crop)), torch.float32, scale=True)
        normalised: Tensor = F.normalize(scaled, list(self.mean), list(self.std))
        return normalised


def image_preprocess(
    spec: EncoderSpec,
    reference: Preprocess,
    backend: str,
    faster: TensorPreprocess | None,
) -> tuple[Preprocess, Json]:
    """What turns an image into pixels, and how it stands in the fingerprint.

    Args:
        reference: the library's own transform, `backend` its name.
        faster: the same on tensors, if it can be said there.

    Raises:
        EncoderError: `resize` asks for what this encoder has no tensor form of.
    """
    if spec.resize == "reference":
        return reference, {"decoding": IMAGE_DECODING, "backend": backend}
    if faster is None:
        raise EncoderError(
            f"encoder {spec}: --resize torchvision cannot follow its preprocessing; leave "
            "--resize off"
        )
    return faster, {"decoding": IMAGE_DECODING, "backend": "torchvision-uint8"}


def resize_of(config: dict[str, Any]) -> TensorPreprocess | None:
    """The tensor form of a timm data configuration; None for other crops than the square from the
    middle."""
    height, width = config["input_size"][1:]
    if (
        config.get("crop_mode", "center") != "center"
        or height != width
        or config["interpolation"] == "random"
    ):
        return None
    edge = int(height / (config.get("crop_pct") or 0.875))
    return TensorPreprocess(
        edge=edge,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def probe(
    forward: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    spec: EncoderSpec,
    device: torch.device,
) -> tuple[int, ...]:
    """Shape of the features of one image, as the model itself gives it.

    Raises:
        EncoderError: the model cannot take pixels of that shape.
    """
    try:
        with torch.inference_mode():
            found = forward(torch.zeros(1, *shape, device=device, dtype=TORCH_DTYPES[spec.dtype]))
    except (RuntimeError, ValueError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise EncoderError(
            f"encoder {spec} cannot take {shape[1]} x {shape[2]} pixels ({first})"
        ) from None
    return tuple(found.shape[1:])
