"""Images as uint8 tensors: the pixels of `apecache.data.images`, decoded faster where torchvision
can."""

import numpy as np
import torch
import torchvision.io
from PIL import ExifTags, Image
from torch import Tensor

from apecache.data.images import decode_image, decode_opened


def decode_tensor(data: bytes, key: str) -> Tensor:
    """RGB uint8 [3, height, width] from the bytes of a file, equal to what `decode_image` gives.

    Plain JPEGs are decoded by torchvision, everything else, and what torchvision refuses, by
    Pillow.

    Raises:
        RowError: not-an-image, too-large, truncated.
    """
    decoded = decode_opened(
        data,
        key,
        lambda opened: _decode_jpeg(data) if _is_plain_jpeg(opened) else None,
    )
    if decoded is not None:
        return decoded
    return torch.from_numpy(np.array(decode_image(data, key))).permute(2, 0, 1)


def _is_plain_jpeg(opened: Image.Image) -> bool:
    """Grey or RGB, and the right way up."""
    if opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
        return False
    return bool(opened.getexif().get(ExifTags.Base.Orientation, 1) == 1)


def _decode_jpeg(data: bytes) -> Tensor | None:
    """None: torchvision refuses it, or is of a version that leaves decoding to another package."""
    decode = getattr(torchvision.io, "decode_jpeg", None)
    try:
        return (
            decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), "RGB") if decode else None
        )
    except RuntimeError:
        return None
