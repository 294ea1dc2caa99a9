"""Large contrastive batches in little memory: gradients of the whole batch, computed slice by slice (GradCache)."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

Encode = Callable[[range], tuple[Tensor, Tensor]]
"""Positions in the batch -> embeddings of images and texts, [n, dim] each."""
Loss = Callable[[Tensor, Tensor], Tensor]


def backward_in_slices(encode: Encode, loss: Loss, n: int, slice_size: int | None = None) -> Tensor:
    """Add the gradients of loss(encode(all n)) to every parameter; returns the loss, detached.

    With slices the embeddings are computed without a graph, then the loss and its gradient by the embeddings, then each
    slice once more, through which that gradient goes back (Gao et al. 2021, section 3.2). It is exact: no batch
    statistics may be used, and dropout draws the same in both passes.
    """
    if slice_size is None or slice_size >= n:
        value = loss(*encode(range(n)))
        value.backward()
        return value.detach()
    parts = [range(begin, min(begin + slice_size, n)) for begin in range(0, n, slice_size)]
    seeds = torch.randint(2**62, (len(parts),)).tolist()
    with torch.no_grad():
        found = [_seeded(encode, part, seed) for part, seed in zip(parts, seeds, strict=True)]
    whole = [torch.cat(side).detach().requires_grad_() for side in zip(*found, strict=True)]
    value = loss(whole[0], whole[1])
    value.backward()
    for part, seed in zip(parts, seeds, strict=True):
        embedded = _seeded(encode, part, seed)
        gradients = [w.grad[part.start : part.stop] for w in whole if w.grad is not None]
        live = [(x, gradient) for x, gradient in zip(embedded, gradients, strict=True) if x.requires_grad]
        if live:
            torch.autograd.backward([x for x, _ in live], [gradient for _, gradient in live])
    return value.detach()


def forked_generators() -> AbstractContextManager[None]:
    """Leaves torch's generators, of the CPU and the GPU in use, as they were."""
    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def _seeded(encode: Encode, part: range, seed: int) -> tuple[Tensor, Tensor]:
    with forked_generators():
        torch.manual_seed(seed)
        return encode(part)
