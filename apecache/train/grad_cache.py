"""Large contrastive batches in little memory: gradients of the whole batch, computed slice by slice
(GradCache), by one process or by several."""

from collections.abc import Callable

import torch
from torch import Tensor

from apecache.encoders.sample_draws import SampleDraws
from apecache.errors import OptionError
from apecache.train.ranks import ALONE, Ranks

Encode = Callable[[range], tuple[Tensor, Tensor]]
"""Positions in the batch -> embeddings [n, dim] of these images, and [k n, dim] of the k texts of
each."""
Loss = Callable[[Tensor, Tensor], Tensor]


def backward_in_slices(
    encode: Encode,
    loss: Loss,
    n: int,
    slice_size: int | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Add the gradients of loss(encode(all n)) to every parameter; returns the loss, detached.

    The embeddings of the whole batch are leaves of the loss; their gradients then go back through
    the towers, slice by slice, each of which is encoded once more (Gao et al. 2021, section 3.2),
    unless it is the only one. It is exact: no batch statistics may be used, and dropout draws by
    sample (`apecache.encoders.sample_draws`) from one seed for every batch. Masks depend neither on
    the pass nor on slices and processes.

    With several `ranks` each encodes its share, and what it adds to a parameter is its part of the
    gradient: their sum is the whole one, that of the loss's own parameters included.

    Raises:
        OptionError: there are several slices or processes, and a layer draws otherwise than by
            sample.
    """
    mine = _slices(ranks.shares(n)[ranks.rank], slice_size)
    seed = int(torch.randint(2**62, ()))
    whole_batch = len(mine[0]) == n
    with torch.set_grad_enabled(len(mine) == 1):
        found = [_seeded(encode, part=part, seed=seed, whole_batch=whole_batch) for part in mine]
    begin = mine[0].start
    share = mine[-1].stop - mine[0].start
    whole = [
        _whole(side, begin=begin, share=share, n=n, ranks=ranks)
        for side in zip(*found, strict=True)
    ]
    value = loss(whole[0], whole[1])
    (value / ranks.size).backward()
    for part in mine:
        embedded = (
            found[0]
            if len(mine) == 1
            else _seeded(encode, part=part, seed=seed, whole_batch=whole_batch)
        )
        _go_back(embedded, whole=whole, part=part, ranks=ranks)
    return value.detach()


def _slices(share: range, size: int | None) -> list[range]:
    step = size or len(share)
    return [
        range(begin, min(begin + step, share.stop))
        for begin in range(share.start, share.stop, step)
    ]


def _whole(side: tuple[Tensor, ...], begin: int, share: int, n: int, ranks: Ranks) -> Tensor:
    """Leaf [k n, dim] of all embeddings of a side."""
    own = torch.cat([part.detach() for part in side])
    each = len(own) // share
    return ranks.gathered(own, begin * each, n * each).detach().requires_grad_()


def _go_back(
    embedded: tuple[Tensor, Tensor],
    whole: list[Tensor],
    part: range,
    ranks: Ranks,
) -> None:
    ends = []
    gradients = []
    for end, leaf in zip(embedded, whole, strict=True):
        each = len(end) // len(part)
        if end.requires_grad and leaf.grad is not None:
            ends.append(end)
            gradients.append(leaf.grad[part.start * each : part.stop * each] * ranks.size)
    if ends:
        torch.autograd.backward(ends, gradients)


def _seeded(encode: Encode, part: range, seed: int, whole_batch: bool) -> tuple[Tensor, Tensor]:
    """Encode with draws by sample. Torch's generators, which layers that draw otherwise use, are
    left as they were."""
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
        torch.manual_seed(seed)
        before = _generator_states()
        with SampleDraws(seed, part):
            embedded = encode(part)
        if not whole_batch and not all(map(torch.equal, before, _generator_states())):
            raise OptionError(
                "a layer of the towers draws random numbers that cannot be drawn by sample, so "
                "slices and processes "
                "would train another model; train without --slice and in one process"
            )
    return embedded


def _generator_states() -> list[Tensor]:
    """Of the CPU's generator, and of the GPU's in use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state()] if torch.cuda.is_available() else states
