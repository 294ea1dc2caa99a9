"""Random draws that belong to a sample: dropout masks that no slice, process or padding changes.

A mask is a hash of (seed, number of the draw in the forward pass, sample, position within the
sample), so a sample gets the same mask in whatever company it is encoded.
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

WORD_BITS = 64
LANES = 4
"""Draws of 16 bits in one word."""
LEVELS = 2**16
GOLDEN = 0x9E3779B97F4A7C15 - 2**WORD_BITS
"""Increment and multipliers of SplitMix64 (Steele, Lea and Flood 2014), as signed integers."""
FIRST_FACTOR = 0xBF58476D1CE4E5B9 - 2**WORD_BITS
SECOND_FACTOR = 0x94D049BB133111EB - 2**WORD_BITS
_active: ContextVar["SampleDraws | None"] = ContextVar("apecache_sample_draws", default=None)


class SampleDraws(TorchFunctionMode):
    """Within it, dropout, attention dropout and stochastic depth draw by sample.

    Torch functions that draw in another way, or on tensors whose rows are no samples, draw from
    torch's generators as they always do: a caller sees that by the state of these.

    Args:
        seed: of the step; other steps need other ones.
        samples: numbers of the samples in the whole batch. The first dimension of every tensor that
            is drawn for is as long, or k times as long with the k rows of a sample one after
            another.
        n_draws: draws of the forward pass that came before.
    """

    def __init__(self, seed: int, samples: range, n_draws: int = 0) -> None:
        super().__init__()
        self.seed = seed
        self.samples = samples
        self.n_draws = n_draws
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
        draw = _DRAWS.get(func)
        drawn = None if draw is None else draw(self, *args, **kwargs or {})
        return func(*args, **kwargs or {}) if drawn is None else drawn

    def keep(
        self,
        shape: Sequence[int],
        drop_rate: float,
        device: torch.device,
    ) -> tuple[Tensor, float] | None:
        """Draw what stays.

        Returns:
            A bool tensor of that shape, and the exact share that stays (rates are rounded to 1 /
            65,536); None where the rows are no samples.
        """
        words = self._words(shape, device)
        if words is None:
            return None
        n_dropped = round(drop_rate * LEVELS)
        lanes = words.view(torch.int16)[..., : shape[-1]]
        return lanes >= n_dropped - LEVELS // 2, 1 - n_dropped / LEVELS

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """Draw float64 in [0, 1), of 24 bits; None where the rows are no samples."""
        words = self._words((*shape[:-1], LANES * shape[-1]), device) if shape else None
        return None if words is None else _shifted(words, 40).double() / 2**24

    def _words(self, shape: Sequence[int], device: torch.device) -> Tensor | None:
        """int64, of that shape with a quarter of its last dimension."""
        if len(shape) < 2 or shape[0] % len(self.samples):
            return None
        self.n_draws += 1
        each = shape[0] // len(self.samples)
        first = each * self.samples.start
        last = each * self.samples.stop
        key = torch.tensor(_signed(self.seed + self.n_draws * GOLDEN), device=device)
        key = _mix(_mix(key) + GOLDEN * torch.arange(first + 1, last + 1, device=device))
        for size in (*shape[1:-1], -(-shape[-1] // LANES)):
            key = _mix(key.unsqueeze(-1) + GOLDEN * torch.arange(1, size + 1, device=device))
        return key


def checkpoint_contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Make the `context_fn` of a checkpointed block: when it is run again in the backward pass,
    perhaps by another thread, it draws the same."""
    active = _active.get()
    again = (
        nullcontext()
        if active is None
        else SampleDraws(active.seed, active.samples, active.n_draws)
    )
    return nullcontext(), again


# --- the functions that draw ----------------------------------------------------------------------


def _dropout(
    draws: SampleDraws,
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
) -> Tensor | None:
    if not training or p == 0 or p == 1:
        return None
    drawn = draws.keep(x.shape, p, x.device)
    if drawn is None:
        return None
    kept, share = drawn
    if inplace:
        return x.mul_(1 / share).mul_(kept)
    return x * (1 / share) * kept


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
    """Attention with dropout as plain products: the fused kernels draw masks that nobody else can
    draw."""
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
    """timm's stochastic depth."""
    drawn = (
        None
        if generator is not None or isinstance(p, Tensor)
        else draws.keep(x.shape, 1 - p, x.device)
    )
    return None if drawn is None else x.copy_(drawn[0])


def _rand(
    draws: SampleDraws,
    *shape: Any,
    dtype: Any = None,
    device: Any = None,
    **others: Any,
) -> Tensor | None:
    """transformers' stochastic depth."""
    if others.get("generator") is not None or others.get("out") is not None:
        return None
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    drawn = draws.uniform(sizes, torch.device(device or "cpu"))
    return None if drawn is None else drawn.to(dtype or torch.get_default_dtype())


_DRAWS: dict[Any, Callable[..., Tensor | None]] = {
    F.dropout: _dropout,
    F.scaled_dot_product_attention: _attention,
    torch.Tensor.bernoulli_: _bernoulli,
    torch.rand: _rand,
}


# --- the hash -------------------------------------------------------------------------------------


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finalizer, in the tensor itself."""
    x ^= _shifted(x, 30)
    x *= FIRST_FACTOR
    x ^= _shifted(x, 27)
    x *= SECOND_FACTOR
    x ^= _shifted(x, 31)
    return x


def _shifted(x: Tensor, n_bits: int) -> Tensor:
    """To the right, without the sign."""
    return (x >> n_bits).bitwise_and_(2 ** (WORD_BITS - n_bits) - 1)


def _signed(x: int) -> int:
    """The lowest 64 bits as a signed integer."""
    half = 1 << (WORD_BITS - 1)
    return (x + half) % (2 * half) - half
