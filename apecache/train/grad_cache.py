"""Compute the gradients of a large contrastive batch slice by slice (GradCache).

Slices need little memory. One process or several compute them.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from apecache.device import CPU, generator_states, seeded_generators
from apecache.encoders.sample_draws import SampleDraws
from apecache.errors import OptionError
from apecache.train.ranks import ALONE, Ranks

Encode = Callable[[Sequence[int]], tuple[Tensor, Tensor]]
"""Embed positions of the batch, in the order given: [n, dim] for the images, [n * k, dim] for the k
texts of each."""
Loss = Callable[[Tensor, Tensor], Tensor]
"""Compute the scalar loss of the embeddings of a whole batch."""


def backward_in_slices(
    encode: Encode,
    loss: Loss,
    n: int,
    slice_size: int | None = None,
    lengths: Sequence[int] | None = None,
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
        lengths: Of each position, the length that `encode` pads to, [n]; see `slices_of`.
        ranks: Processes that work on the batch.
        device: Device of the towers.

    Returns:
        The loss, detached.

    Raises:
        OptionError: There are several slices or processes, and a layer draws random numbers
            otherwise than by sample.
    """
    share = ranks.shares(n)[ranks.rank]
    own_slices = slices_of(share, slice_size, lengths)
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
    leaves = [
        gather_slices(side, own_slices, share=share, n=n, ranks=ranks).requires_grad_()
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


def slices_of(
    share: range,
    size: int | None,
    lengths: Sequence[int] | None = None,
) -> list[Sequence[int]]:
    """Cut a share into slices of at most `size` positions.

    Several slices are cut by length: a slice of similar lengths is padded least, and the result is
    the same whatever the order (`apecache.encoders.sample_draws`).

    Args:
        share: Positions of this process.
        size: Positions in a slice; None: all of them.
        lengths: Of each position of the batch, the length of its input, [n]; None: all alike.
    """
    step = size or len(share)
    order: Sequence[int] = share
    if lengths is not None and step < len(share):
        order = sorted(share, key=lengths.__getitem__)
    return [order[begin : begin + step] for begin in range(0, len(share), step)]


def gather_slices(
    embedded: Sequence[Tensor],
    slices: Sequence[Sequence[int]],
    share: range,
    n: int,
    ranks: Ranks,
) -> Tensor:
    """Gather the embeddings of all slices and processes, without gradients.

    Args:
        embedded: Embeddings of each slice of this process, [positions * k, dim].
        slices: Positions of each slice.
        share: Positions of this process.
        n: Positions of all processes.
        ranks: Processes that work on the batch.

    Returns:
        [n * k, dim], in the order of the positions.
    """
    encoded_rows = torch.cat([rows.detach() for rows in embedded])
    rows_per_position = len(encoded_rows) // len(share)
    positions = [position - share.start for slice_ in slices for position in slice_]
    own_rows = torch.empty_like(encoded_rows)
    own_rows[_rows_of(positions, rows_per_position, own_rows.device)] = encoded_rows
    return ranks.gathered(own_rows, share.start * rows_per_position, n * rows_per_position)


def _rows_of(positions: Sequence[int], rows_per_position: int, device: torch.device) -> Tensor:
    """Return the rows of these positions, int64 [positions * rows_per_position]."""
    first_rows = torch.tensor(positions).unsqueeze(1) * rows_per_position
    return (first_rows + torch.arange(rows_per_position)).flatten().to(device)


def _go_back(
    embedded: tuple[Tensor, Tensor],
    side_leaves: list[Tensor],
    slice_positions: Sequence[int],
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
        # A frozen side has no graph.
        if end.requires_grad and leaf.grad is not None:
            ends.append(end)
            rows = _rows_of(slice_positions, rows_per_image, leaf.device)
            gradients.append(leaf.grad[rows] * ranks.size)
    # One call for both sides: they may share parts of a graph.
    if ends:
        torch.autograd.backward(ends, gradients)


def _seeded(
    encode: Encode,
    slice_positions: Sequence[int],
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
