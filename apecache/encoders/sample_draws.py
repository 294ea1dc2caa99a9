"""Draw dropout masks by sample, so that no slice, process or padding changes them.

A mask is a hash of (seed, number of the draw in the forward pass, sample, position within the
sample). A sample therefore gets the same mask whichever samples it is encoded with.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from apecache.device import CPU, send

WORD_BITS = 64
LANES = 4
"""Draws of 16 bits in one word."""
LEVELS = 2**16
# The increment and the multipliers of SplitMix64 (Steele, Lea and Flood 2014), as signed integers,
# since torch has no unsigned arithmetic.
GOLDEN = 0x9E3779B97F4A7C15 - 2**WORD_BITS
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**WORD_BITS
SECOND_FACTOR = 0x94D049BB133111EB - 2**WORD_BITS
_active: ContextVar["SampleDraws | None"] = ContextVar("apecache_sample_draws", default=None)


class SampleDraws(TorchFunctionMode):
    """Make dropout, attention dropout and stochastic depth draw by sample within this context.

    Torch functions that draw in another way, or for tensors whose rows are not samples, use torch's
    generators as always. A caller can detect that by the generators' state.

    Args:
        seed: of the step; every step needs another one.
        samples: numbers of the samples in the whole batch, in any order. The first dimension of
            every tensor that is drawn for has this length, or k times this length with the k rows
            of a sample one after another.
        n_draws: how many draws of the forward pass came before.
        device: of the tensors that are drawn for.
    """

    def __init__(
        self,
        seed: int,
        samples: Sequence[int],
        n_draws: int = 0,
        device: torch.device = CPU,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.samples = samples
        self.n_draws = n_draws
        self.device = device
        self.n_samples = len(samples)
        # Tensors: a compiled model takes them as inputs, where numbers of Python would be
        # constants, and every step would compile anew.
        numbers = send(torch.tensor([_signed(seed), *samples]), device)
        self._key = numbers[0]
        self._samples = numbers[1:]
        self._tokens: list[Token[SampleDraws | None]] = []

    def __enter__(self) -> "SampleDraws":
        super().__enter__()
        self._tokens.append(_active.set(self))
        return self

    def __exit__(self, *error: Any) -> None:
        _active.reset(self._tokens.pop())
        super().__exit__(*error)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        keywords = kwargs or {}
        draw = _DRAWS.get(func)
        result = None if draw is None else draw(self, *args, **keywords)
        return func(*args, **keywords) if result is None else result

    def keep(
        self,
        shape: Sequence[int],
        drop_rate: float,
        device: torch.device,
    ) -> tuple[Tensor, float] | None:
        """Draw which elements stay.

        Returns:
            A bool tensor of that shape, and the exact share that stays (rates are rounded to 1 /
            65,536); None where the rows are not samples.
        """
        words = self._words(shape, device)
        if words is None:
            return None
        n_dropped = round(drop_rate * LEVELS)
        lanes = words.view(torch.int16)[..., : shape[-1]]
        # int16 lanes are signed: their lowest value is -LEVELS / 2.
        return lanes >= n_dropped - LEVELS // 2, 1 - n_dropped / LEVELS

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Draw float64 in [0, 1), of 24 bits; None where the rows are not samples."""
        words = self._words((*shape[:-1], LANES * shape[-1]), device) if shape else None
        if words is None:
            return None
        # The highest 24 bits: they fit the mantissa of a float32.
        return _shifted(words, 40).double() / 2**24

    def _words(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Hash int64 words: of that shape, with a quarter of its last dimension, rounded up."""
        if len(shape) < 2 or shape[0] % self.n_samples:
            return None
        self.n_draws += 1
        key = self._key.to(device) + _signed(self.n_draws * GOLDEN)
        rows = self._rows(shape[0] // self.n_samples, device)
        key = _mix(_mix(key) + GOLDEN * rows)
        n_words = -(-shape[-1] // LANES)
        # One dimension after the other: a position's word does not depend on the sizes, so
        # padding changes no mask.
        for size in (*shape[1:-1], n_words):
            positions = torch.arange(1, size + 1, device=device)
            key = _mix(key.unsqueeze(-1) + GOLDEN * positions)
        return key

    def _rows(self, rows_per_sample: int, device: torch.device) -> Tensor:
        """Number the rows of the samples in the whole batch, from 1."""
        first_rows = rows_per_sample * self._samples.to(device).unsqueeze(1)
        return (first_rows + torch.arange(1, rows_per_sample + 1, device=device)).flatten()


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Return the two contexts of a checkpointed block: of its first run and of its second.

    The block draws the same when the backward pass runs it again, perhaps in another thread.
    """
    active = _active.get()
    if active is None:
        return nullcontext(), nullcontext()
    # n_draws as it is now: the second run begins with the number that the first one begins with.
    return nullcontext(), SampleDraws(active.seed, active.samples, active.n_draws, active.device)


# --- the functions that draw ----------------------------------------------------------------------


def _dropout(
    draws: SampleDraws,
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor | None:
    # Nothing is drawn here, so torch's own function gives the same in every slice.
    if not training or p == 0 or p == 1:
        return None
    draw = draws.keep(x.shape, p, x.device)
    if draw is None:
        return None
    keep_mask, keep_share = draw
    if inplace:
        return x.mul_(1 / keep_share).mul_(keep_mask)
    # Scaled before it is masked, as above, so that both forms round alike.
    return x * (1 / keep_share) * keep_mask


def _attention(
    draws: SampleDraws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """Compute attention with dropout as plain products.

    The fused kernels cannot be used: they draw masks of their own.
    """
    if dropout_p == 0 or dropout_p == 1 or enable_gqa or is_causal:
        return None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    weights = _dropout(draws, scores.softmax(-1), dropout_p)
    return None if weights is None else weights @ value


def _bernoulli(
    draws: SampleDraws,
    x: Tensor,
    p: float | Tensor = 0.5,
    *,
    generator: Any = None,
) -> Tensor | None:
    """Draw timm's stochastic depth, in place."""
    if generator is not None or isinstance(p, Tensor):
        return None
    draw = draws.keep(x.shape, 1 - p, x.device)
    if draw is None:
        return None
    keep_mask, _ = draw
    return x.copy_(keep_mask)


def _rand(
    draws: SampleDraws,
    *shape: Any,
    dtype: Any = None,
    device: Any = None,
    **options: Any,
) -> Tensor | None:
    """Draw transformers' stochastic depth."""
    if options.get("generator") is not None or options.get("out") is not None:
        return None
    # torch.rand takes its sizes one by one or as one sequence.
    is_sequence = len(shape) == 1 and not isinstance(shape[0], int)
    draw_shape = tuple(shape[0]) if is_sequence else shape
    draw = draws.uniform(draw_shape, torch.device(device or "cpu"))
    return None if draw is None else draw.to(dtype or torch.get_default_dtype())


_DRAWS: dict[Any, Callable[..., Tensor | None]] = {
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.bernoulli_: _bernoulli,
    torch.rand: _rand,
}


# --- the hash -------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """Apply SplitMix64's finalizer, in place."""
    x ^= _shifted(x, 30)
    x *= FIRST_FACTOR
    x ^= _shifted(x, 27)
    x *= SECOND_FACTOR
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, n_bits: int) -> Tensor:
    """Shift to the right as an unsigned integer."""
    # torch's int64 shift copies the sign bit, so the copies are masked off.
    return (x >> n_bits).bitwise_and_(2 ** (WORD_BITS - n_bits) - 1)


def _signed(x: int) -> int:
    """Return the lowest 64 bits as a signed integer."""
    half = 1 << (WORD_BITS - 1)
    return (x + half) % (2 * half) - half
