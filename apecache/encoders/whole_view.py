"""Show a model the whole of a square view, although its preprocessing crops the middle.

A random crop is a view already: a second crop from its middle would show 0.76 of it or less, and
never the edges of a photo. So the view gets a margin as wide as what is cut away.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from apecache.encoders.preprocess import Preprocess

PROBE_SIDE = 512
"""Pixels of the images that a preprocessing is tried on."""
EDGE_SHARE = 0.1
"""Share of the output at each edge that is not measured: filters behave differently there."""


@dataclass(frozen=True, kw_only=True)
class WholeView:
    """Preprocess a square view so that all of it is seen."""

    preprocess: Preprocess
    """Preprocessing of the encoder."""
    height_share: float
    """Share of an image's height that the preprocessing keeps."""
    width_share: float

    def __call__(self, view: Image.Image) -> Tensor:
        """Return the pixels of an RGB view."""
        height = round(view.height / self.height_share)
        width = round(view.width / self.width_share)
        if (height, width) == (view.height, view.width):
            return self.preprocess(view)
        # The margin repeats the edge, so that filters at the edge mix in nothing else.
        top_margin = (height - view.height) // 2
        left_margin = (width - view.width) // 2
        margins = (
            (top_margin, height - view.height - top_margin),
            (left_margin, width - view.width - left_margin),
            (0, 0),
        )
        padded = np.pad(np.asarray(view), margins, mode="edge")
        return self.preprocess(Image.fromarray(padded))


def whole_view(preprocess: Preprocess) -> WholeView:
    """Measure what a preprocessing crops, and return one that crops nothing of a square view."""
    ramp = np.arange(PROBE_SIDE) * 256 // PROBE_SIDE
    across = np.broadcast_to(ramp, (PROBE_SIDE, PROBE_SIDE))
    # Means along the other axis: rounding to 8 bits averages out.
    width_share = _share(preprocess, across, lambda pixels: pixels.mean(0))
    height_share = _share(preprocess, across.T, lambda pixels: pixels.mean(1))
    return WholeView(
        preprocess=preprocess,
        height_share=height_share,
        width_share=width_share,
    )


def _share(
    preprocess: Preprocess,
    ramp: NDArray[np.int_],
    profile: Callable[[Tensor], Tensor],
) -> float:
    """Return the share of the side along which `ramp` rises from 0 to 255 that is kept.

    Args:
        profile: Reduces the output [height, width] to the axis of the ramp.
    """
    black = _first_channel(preprocess, np.zeros_like(ramp))
    white = _first_channel(preprocess, np.full_like(ramp, 255))
    # Normalization is affine, so black and white give its offset and factor.
    source_positions = (_first_channel(preprocess, ramp) - black) / (white - black)
    values = profile(source_positions).numpy()
    n_values = len(values)
    n_edge = int(EDGE_SHARE * n_values)
    inner = np.arange(n_edge, n_values - n_edge)
    slope = float(np.polyfit(inner, values[inner], 1)[0])
    # The last value of the ramp is 255 / 256 of the way.
    share = slope * n_values * 255 / 256
    return min(1.0, share)


def _first_channel(preprocess: Preprocess, gray: NDArray[np.int_]) -> Tensor:
    """Return the preprocessed red channel of a gray image, float64 [height, width]."""
    rgb = np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    pixels = preprocess(Image.fromarray(rgb))
    return pixels[0].to(torch.float64)
