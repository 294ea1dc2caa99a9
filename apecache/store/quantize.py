"""int8 features: each vector (of a row, of a token, of a view) by a scale of its own.

    value = round(x / scale), scale = max |x| / 127;  x is read back as value * scale

so that no number is off by more than half a scale, and by what float16 rounds where it is read as
that. A vector of zeros has the scale 0; one that is not there, NaN.
"""

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
BLOCK_NUMBERS = 1 << 18
"""Numbers that are quantised at once: what is needed in between stays small."""
UNSPREAD_NUMBERS = 1 << 15
"""Up to so many, torch works on one thread."""


def quantise(features: NDArray[np.floating]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """`features` [..., dim], finite or not; values int8 [..., dim], scales float32 [...]: NaN or
    infinite where a number of the vector is, and its values 0."""
    flat = features.reshape(-1, features.shape[-1])
    values = np.zeros(flat.shape, np.int8)
    scales = np.empty(len(flat), np.float32)
    step = max(1, BLOCK_NUMBERS // features.shape[-1])
    for begin in range(0, len(flat), step):
        block = flat[begin : begin + step].astype(np.float32)
        scale = np.abs(block).max(1) / np.float32(LARGEST)
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
    """Into `out` [..., dim], contiguous; a vector whose scale is NaN becomes NaN.

    By torch, which converts to float16 faster than numpy, in blocks that it does not spread over
    threads: shards are read side by side.
    """
    import torch

    if not out.flags.carray:
        raise ValueError("out: expected a contiguous, writable array")
    dim = values.shape[-1]
    flat = torch.from_numpy(values.reshape(-1, dim))
    own = torch.from_numpy(scales.reshape(-1, 1))
    target = torch.from_numpy(out.reshape(-1, dim))
    step = max(1, UNSPREAD_NUMBERS // dim)
    for begin in range(0, len(flat), step):
        block = slice(begin, begin + step)
        target[block] = flat[block] * own[block]
