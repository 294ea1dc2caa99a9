"""Decode images to uint8 tensors.

The pixels are those of `apecache.data.images`, decoded faster where torchvision can do it.
"""

import numpy as np
import torch
import torchvision.io
from PIL import ExifTags, Image
from torch import Tensor

from apecache.data.images import DEFAULT_RULES, decode_image, decode_opened
from apecache.data.pixels import PixelRules

END_OF_IMAGE = b"\xff\xd9"
"""Marker that ends a JPEG file."""


def decode_tensor(data: bytes, key: str, rules: PixelRules = DEFAULT_RULES) -> Tensor:
    """Decode the bytes of a file to the pixels that `decode_image` gives.

    torchvision decodes plain JPEGs; Pillow decodes everything else, and what torchvision refuses.

    Returns:
        RGB uint8 [3, height, width].

    Raises:
        RowError: As `decode_image` raises.
    """
    decoded = decode_opened(
        data,
        key,
        decode=lambda opened: _decode_jpeg(data) if _is_plain_jpeg(opened) else None,
        rules=rules,
    )
    # Equal pixels for both: only JPEGs that both libraries decode alike are given to torchvision.
    if decoded is not None:
        return decoded
    pixels = np.array(decode_image(data, key, rules))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def plain_jpeg_or_pixels(data: bytes, key: str, rules: PixelRules = DEFAULT_RULES) -> Tensor:
    """Return the bytes of a plain and complete JPEG as they are, and pixels of other files.

    Returns:
        uint8 [n], the file, for another decoder; or RGB uint8 [3, height, width].

    Raises:
        RowError: As `decode_image` raises.
    """
    # Other decoders may complete a truncated file with gray.
    is_complete = data.endswith(END_OF_IMAGE)
    is_plain = is_complete and decode_opened(data, key, decode=_is_plain_jpeg, rules=rules)
    if is_plain:
        # A writable copy: torch warns about tensors of read-only memory.
        return torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return decode_tensor(data, key, rules)


def _is_plain_jpeg(opened: Image.Image) -> bool:
    """Return whether an image is a JPEG in gray or RGB, and upright."""
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return False
    return bool(opened.getexif().get(ExifTags.Base.Orientation, 1) == 1)


def _decode_jpeg(data: bytes) -> Tensor | None:
    """Decode a JPEG; None if torchvision refuses it, or is a version without decoders."""
    decode = getattr(torchvision.io, "decode_jpeg", None)
    if decode is None:
        return None
    try:
        # A writable copy: torch warns about tensors of read-only memory.
        file_bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        pixels: Tensor = decode(file_bytes, "RGB")
        return pixels
    except RuntimeError:
        return None
