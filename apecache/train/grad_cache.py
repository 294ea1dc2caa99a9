"""Large contrastive batches in little memory: gradients of the whole batch, computed slice by slice (GradCache), by one
process or by several."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from apecache.train.ranks import ALONE, Ranks

Encode = Callable[[range], tuple[Tensor, Tensor]]
"""Positions in the batch -> embeddings [n, dim] of these images, and [k n, dim] of the k texts of each."""
Loss = Callable[[Tensor, Tensor], Tensor]


def backward_in_slices(
    encode: Encode, loss: Loss, n: int, slice_size: int | None = None, ranks: Ranks = ALONE
) -> Tensor:
    """Add the gradients of loss(encode(all n)) to every parameter; returns the loss, detached.

    The embeddings of the whole batch are leaves of the loss; their gradients then go back through the towers, slice by
    slice, each of which is encoded once more (Gao et al. 2021, section 3.2), unless it is the only one. It is exact: no
    batch statistics may be used, and dropout draws the same in both passes, from a seed of its own for every slice.

    With several `ranks` each encodes its share, and what it adds to a parameter is its part of the gradient: their sum
    is the whole one, that of the loss's own parameters included.
    """
    shares = [_slices(share, slice_size) for share in ranks.shares(n)]
    seeds = torch.randint(2**62, (sum(map(len, shares)),)).tolist()
    before = sum(len(parts) for parts in shares[: ranks.rank])
    mine = list(zip(shares[ranks.rank], seeds[before:], strict=False))
    with torch.set_grad_enabled(len(mine) == 1):
        found = [_seeded(encode, part, seed) for part, seed in mine]
    begin, share = mine[0][0].start, mine[-1][0].stop - mine[0][0].start
    whole = [_whole(side, begin, share, n, ranks) for side in zip(*found, strict=True)]
    value = loss(whole[0], whole[1])
    (value / ranks.size).backward()
    for part, seed in mine:
        embedded = found[0] if len(mine) == 1 else _seeded(encode, part, seed)
        _go_back(embedded, whole, part, ranks)
    return value.detach()


def _slices(share: range, size: int | None) -> list[range]:
    step = size or len(share)
    return [range(begin, min(begin + step, share.stop)) for begin in range(share.start, share.stop, step)]


def _whole(side: tuple[Tensor, ...], begin: int, share: int, n: int, ranks: Ranks) -> Tensor:
    """Leaf [k n, dim] of all embeddings of a side."""
    own = torch.cat([part.detach() for part in side])
    each = len(own) // share
    return ranks.gathered(own, begin * each, n * each).detach().requires_grad_()


def _go_back(embedded: tuple[Tensor, Tensor], whole: list[Tensor], part: range, ranks: Ranks) -> None:
    ends, gradients = [], []
    for end, leaf in zip(embedded, whole, strict=True):
        each = len(end) // len(part)
        if end.requires_grad and leaf.grad is not None:
            ends.append(end)
            gradients.append(leaf.grad[part.start * each : part.stop * each] * ranks.size)
    if ends:
        torch.autograd.backward(ends, gradients)


def forked_generators() -> AbstractContextManager[None]:
    """Leaves torch's generators, of the CPU and the GPU in use, as they were."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _seeded(encode: Encode, part: range, seed: int) -> tuple[Tensor, Tensor]:
    with forked_generators():
        torch.manual_seed(seed)
        return encode(part)
