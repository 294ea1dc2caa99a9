"""Quantize features to int8: each vector (of a row, token or view) has its own scale.

    value = round(x / scale), scale = max |x| / 127;  x is read back as value * scale

The error of a number is at most half a scale, plus the rounding of float16 where it is read as
that. A vector of zeros has the scale 0, and a missing vector has the scale NaN.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
BLOCK_NUMBERS = 1 << 18
"""Numbers that are quantized at once, which limits the memory of intermediate results."""
UNSPREAD_NUMBERS = 1 << 15
"""Numbers up to which torch works on one thread."""


def quantize(features: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantize features, which may have numbers that are not finite.

    Args:
        features: [..., dim], not normalized.

    Returns:
        Values int8 [..., dim] and scales float32 [...]. A vector with a number that is NaN or
        infinite has such a scale, and the values 0.
    """
    flat = features.reshape(-1, features.shape[-1])
    values = np.zeros(flat.shape, np.int8)
    scales = np.empty(len(flat), np.float32)
    step = max(1, BLOCK_NUMBERS // features.shape[-1])
    for begin in range(0, len(flat), step):
        block = flat[begin : begin + step].astype(np.float32)
        scale = np.abs(block).max(1) / np.float32(LARGEST)
        # The other vectors keep the values 0.
        usable = np.isfinite(scale) & (scale > 0)
        block[usable] /= scale[usable, None]
        values[begin : begin + step][usable] = np.rint(block[usable])
        scales[begin : begin + step] = scale
    return values.reshape(features.shape), scales.reshape(features.shape[:-1])


def restore(
    values: NDArray[np.int8],
    scales: NDArray[np.float32],
    out: NDArray[np.floating],
) -> None:
    """Write `values * scales` into a buffer; a vector whose scale is NaN becomes NaN.

    Args:
        values: int8 [..., dim].
        scales: float32 [...].
        out: The buffer, float16 or float32 [..., dim], contiguous.
    """
    # By torch, which converts to float16 faster than numpy. Its blocks are too small to be spread
    # over threads, because shards are read in parallel already.
    import torch

    if not out.flags.carray:
        raise ValueError("out: expected a contiguous, writable array")
    dim = values.shape[-1]
    flat = torch.from_numpy(values.reshape(-1, dim))
    scale_column = torch.from_numpy(scales.reshape(-1, 1))
    target = torch.from_numpy(out.reshape(-1, dim))
    step = max(1, UNSPREAD_NUMBERS // dim)
    for begin in range(0, len(flat), step):
        block = slice(begin, begin + step)
        target[block] = flat[block] * scale_column[block]
