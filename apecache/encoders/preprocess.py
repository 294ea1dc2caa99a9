"""Resize, crop and normalize RGB images for a model.

By default the encoder's own library does it (`from_timm`, `from_open_clip`,
`preprocess_transformers`, `from_sentence_transformers`). On request `TensorPreprocess` does the
same steps faster, on tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from apecache.device import is_accelerator
from apecache.encoders.encoder import computed_in
from apecache.encoders.spec import EncoderSpec
from apecache.errors import EncoderError
from apecache.fingerprint import IMAGE_DECODING, Json

Preprocess = Callable[[Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class TensorPreprocess:
    """Resize, crop and normalize on uint8 tensors [3, height, width].

    `benchmarks/speed/extract` prints the share of values that differ from Pillow's by one to two in
    255.
    """

    edge: int
    """Shorter side in pixels after resizing."""
    crop: tuple[int, int]
    """(height, width) in pixels, from the middle."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Tensor | Image.Image) -> Tensor:
        """Return float32 [3, *crop]: scaled to 0..1, minus `mean`, divided by `std`.

        Augmented views are Pillow images; decoders give tensors.
        """
        return self.normalize(self.pixels(image))

    def pixels(self, image: Tensor | Image.Image) -> Tensor:
        """Return uint8 [3, *crop], resized and cropped."""
        pixels = image if isinstance(image, Tensor) else F.pil_to_tensor(image)
        resized = F.resize(
            pixels,
            [self.edge],
            interpolation=InterpolationMode(self.interpolation),
            antialias=True,
        )
        # Cropped before the change to float32: a quarter of the bytes to move.
        cropped: Tensor = F.center_crop(resized, list(self.crop))
        return cropped

    def normalize(self, pixels: Tensor) -> Tensor:
        """Return float32 [..., 3, *crop] for uint8 pixels, on their device."""
        scaled = F.to_dtype(pixels, torch.float32, scale=True)
        if not is_accelerator(pixels.device):
            normalized: Tensor = F.normalize(scaled, list(self.mean), list(self.std))
            return normalized
        # torchvision would send both lists in each call, and wait for the device.
        mean, std = _constants(tuple(self.mean), tuple(self.std), pixels.device)
        on_device: Tensor = scaled.sub_(mean).div_(std)
        return on_device


@lru_cache(maxsize=8)
def _constants(
    mean: tuple[float, ...],
    std: tuple[float, ...],
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the channels, float32 [3, 1, 1], on a device."""
    means = torch.tensor(mean).view(3, 1, 1)
    deviations = torch.tensor(std).view(3, 1, 1)
    return means.to(device), deviations.to(device)


def choose_preprocess(
    spec: EncoderSpec,
    reference: Preprocess,
    backend: str,
    tensor_form: TensorPreprocess | None,
) -> tuple[Preprocess, Json]:
    """Choose what turns an image into pixels.

    Args:
        reference: the library's own transform.
        backend: name of the reference in the fingerprint.
        tensor_form: the same on tensors; None if there is no such form.

    Returns:
        The preprocessing, and its description for the fingerprint.

    Raises:
        EncoderError: `resize` asks for a tensor form, and this encoder has none.
    """
    # Both decode by the same rules, with different decoders.
    if spec.resize == "reference":
        return reference, {"decoding": IMAGE_DECODING, "backend": backend}
    if tensor_form is None:
        raise EncoderError(
            f"encoder {spec}: --resize torchvision cannot follow its preprocessing; leave "
            "--resize off"
        )
    return tensor_form, {"decoding": IMAGE_DECODING, "backend": "torchvision-uint8"}


def timm_tensor_form(config: dict[str, Any]) -> TensorPreprocess | None:
    """Return the tensor form of a timm data configuration; None unless it crops a center square."""
    height, width = config["input_size"][1:]
    is_centered = config.get("crop_mode", "center") == "center"
    if not is_centered or height != width or config["interpolation"] == "random":
        return None
    # As timm: 0.875 where the configuration names no share, and rounded down.
    edge = int(height / (config.get("crop_pct") or 0.875))
    return TensorPreprocess(
        edge=edge,
        crop=(height, width),
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def feature_shape(
    forward: Callable[[Tensor], Tensor],
    shape: tuple[int, int, int],
    spec: EncoderSpec,
    device: torch.device,
) -> tuple[int, ...]:
    """Run the model on one black image and return the shape of its features.

    Args:
        shape: (3, height, width) of the pixels.

    Raises:
        EncoderError: the model cannot take pixels of that shape.
    """
    dtype = computed_in(spec.dtype, device)
    try:
        with torch.no_grad():
            features = forward(torch.zeros(1, *shape, device=device, dtype=dtype))
    except (RuntimeError, ValueError, AssertionError) as error:
        first_line = str(error).splitlines()[0]
        raise EncoderError(
            f"encoder {spec} cannot take {shape[1]} x {shape[2]} pixels ({first_line})"
        ) from None
    return tuple(features.shape[1:])
