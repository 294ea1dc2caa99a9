"""Compute the gradients of a large contrastive batch slice by slice (GradCache).

Slices need little memory. One process or several compute them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from apecache.device import CPU, generator_states, seeded_generators
from apecache.encoders.sample_draws import SampleDraws
from apecache.errors import OptionError
from apecache.train.ranks import ALONE, Ranks

Encode = Callable[[range], tuple[Tensor, Tensor]]
"""Embed positions of the batch: [n, dim] for the images, [n * k, dim] for the k texts of each."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Compute the scalar loss of the embeddings of a whole batch."""


def backward_in_slices(
    encode: Encode,
    loss: Loss,
    n: int,
    slice_size: int | None = None,
    ranks: Ranks = ALONE,
    device: torch.device = CPU,
) -> Tensor:
    """Add the gradients of loss(encode(all n)) to every parameter.

    The embeddings of the whole batch are leaves of the loss. Their gradients then go back through
    the towers, slice by slice. Each slice is encoded a second time for that (Gao et al. 2021,
    section 3.2), unless it is the only one.

    The result is exact if no layer uses batch statistics. Dropout draws by sample
    (`apecache.encoders.sample_draws`) from one seed for every batch, so masks depend neither on
    the pass nor on slices and processes.

    With several `ranks` each process encodes its share and adds its summand of the gradient. The
    sum over processes is the gradient of the batch, also for the loss's own parameters.

    Args:
        encode: Embeds positions of the batch.
        loss: Computes the loss of the batch's embeddings.
        n: Images in the batch.
        slice_size: Images in a slice; None: the share of this process.
        ranks: Processes that work on the batch.
        device: Device of the towers.

    Returns:
        The loss, detached.

    Raises:
        OptionError: There are several slices or processes, and a layer draws random numbers
            otherwise than by sample.
    """
    own_slices = slices_of(ranks.shares(n)[ranks.rank], slice_size)
    seed = int(torch.randint(2**62, ()))
    whole_batch = len(own_slices[0]) == n
    encode_seeded = partial(
        _seeded,
        encode,
        seed=seed,
        whole_batch=whole_batch,
        device=device,
    )
    # Several slices are encoded without a graph here, and with one in the second pass below.
    with torch.set_grad_enabled(len(own_slices) == 1):
        slice_embeddings = [encode_seeded(positions) for positions in own_slices]
    begin = own_slices[0].start
    share = own_slices[-1].stop - own_slices[0].start
    leaves = [
        _whole(side, begin=begin, share=share, n=n, ranks=ranks)
        for side in zip(*slice_embeddings, strict=True)
    ]
    value = loss(leaves[0], leaves[1])
    # Every process computes the whole loss, and gradients are added up over processes. Dividing
    # here keeps the loss's own parameters right; `_go_back` multiplies again for the towers.
    (value / ranks.size).backward()
    for positions in own_slices:
        is_whole_share = len(own_slices) == 1
        embedded = slice_embeddings[0] if is_whole_share else encode_seeded(positions)
        _go_back(embedded, side_leaves=leaves, slice_positions=positions, ranks=ranks)
    return value.detach()


def slices_of(share: range, size: int | None) -> list[range]:
    """Cut a share into slices of at most `size` positions."""
    step = size or len(share)
    return [
        range(begin, min(begin + step, share.stop))
        for begin in range(share.start, share.stop, step)
    ]


def _whole(side: tuple[Tensor, ...], begin: int, share: int, n: int, ranks: Ranks) -> Tensor:
    """Gather all embeddings of a side, [n * k, dim], as one leaf of the loss."""
    own_rows = torch.cat([embedded.detach() for embedded in side])
    rows_per_image = len(own_rows) // share
    gathered = ranks.gathered(own_rows, begin * rows_per_image, n * rows_per_image)
    return gathered.detach().requires_grad_()


def _go_back(
    embedded: tuple[Tensor, Tensor],
    side_leaves: list[Tensor],
    slice_positions: range,
    ranks: Ranks,
) -> None:
    """Send the gradients of a slice's embeddings back through the towers.

    Args:
        embedded: Embeddings of the slice with their graphs, image before text.
        side_leaves: Leaves of both sides, with gradients.
        slice_positions: Positions of the slice.
        ranks: Processes that work on the batch.
    """
    ends = []
    gradients = []
    for end, leaf in zip(embedded, side_leaves, strict=True):
        rows_per_image = len(end) // len(slice_positions)
        first_row = slice_positions.start * rows_per_image
        end_row = slice_positions.stop * rows_per_image
        # A frozen side has no graph.
        if end.requires_grad and leaf.grad is not None:
            ends.append(end)
            gradients.append(leaf.grad[first_row:end_row] * ranks.size)
    # One call for both sides: they may share parts of a graph.
    if ends:
        torch.autograd.backward(ends, gradients)


def _seeded(
    encode: Encode,
    slice_positions: range,
    seed: int,
    whole_batch: bool,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Encode with draws by sample, and restore torch's generators.

    Raises:
        OptionError: A layer draws from torch's generators, and this is not the whole batch.
    """
    with seeded_generators(seed, device):
        before = generator_states(device)
        with SampleDraws(seed, slice_positions, device=device):
            embedded = encode(slice_positions)
        # Changed states show that a layer drew otherwise than by sample.
        if not whole_batch and not all(map(torch.equal, before, generator_states(device))):
            raise OptionError(
                "a layer of the towers draws random numbers that cannot be drawn by sample, so "
                "slices and processes would train another model; train without --slice and in one "
                "process"
            )
    return embedded
