"""Count the parameters, operations and bytes of a tower on the meta device, without running it.

Operations are counted with the very parameters switched on that the recipe trains. A multiplication
and an addition are two operations, as in torch's own counter.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apecache.encoders.tower import Cut, Tower, count_positions
from apecache.errors import OptionError
from apecache.fingerprint import Modality
from apecache.heads.head import Head
from apecache.models.freezing import FreezeDecision, find_cut

STORED_BYTES = 2
"""Bytes of one number in the store (float16)."""
Parts = tuple[tuple[str, int, int], ...]
"""Of each part: its name, how many of its parameters train, and how many it has."""


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """Hold the size of a data set, and how a device works on it."""

    rows: int
    """Images."""
    captions: int = 1
    """Captions of each image."""
    tokens: int = 32
    """Tokens of each caption, special tokens and padding included."""
    slice_size: int | None = None
    """Pairs that are in memory at once; None: the whole batch."""
    utilization: float = 1.0
    """Share of the device's rate that is reached."""
    price: float | None = None
    """Of one hour of the device, in any currency; None: no money is computed."""


@dataclass(frozen=True, kw_only=True)
class SidePlan:
    """Hold what one tower trains, where it is cut, and what one image or text costs in it."""

    side: Modality
    parts: Parts
    cut: Cut | None
    """None: the tower runs from its inputs."""
    reason: str
    cache_bytes: int
    below_flops: int
    """Of one item, forward up to the cut: what the cache saves."""
    live_flops: int
    """Of one item, forward and backward above the cut, in each training step."""
    saved_bytes: int
    """float32 activations of one item that wait for the backward pass."""
    tokens: int = 0
    """Positions of each cached item; 0 where its pooled features are cached, or nothing."""

    @property
    def n_trained(self) -> int:
        """Return the number of trained parameters."""
        return sum(trained for _, trained, _ in self.parts)

    @property
    def n_parameters(self) -> int:
        """Return the number of all parameters."""
        return sum(count for _, _, count in self.parts)


@dataclass(frozen=True, kw_only=True)
class ItemCosts:
    """Hold what one item costs in a tower without a cache, and in its head."""

    whole_flops: int
    """Of the tower's whole forward pass."""
    uncached_flops: int
    """Of the tower, forward and backward, with nothing cached."""
    uncached_saved: int
    """Bytes of the tower's activations then."""
    head_flops: int
    """Of the head, forward and backward; no cache changes them."""
    head_saved: int
    """Bytes of the head's activations."""
    out_dim: int


def count_side(
    tower: Tower,
    head: Head,
    matches: Sequence[FreezeDecision],
    spec: PlanSpec,
) -> tuple[SidePlan, ItemCosts]:
    """Count one tower with its head.

    Args:
        tower: on the meta device, with the recipe's parameters switched on.
        matches: of both sides; those of the other side are ignored.
    """
    tower_cut = find_cut(matches, tower)
    is_cached = tower_cut.cut is not None
    inputs, mask = example(tower, spec)
    with torch.no_grad():
        below = _below(tower_cut.cut, tower, head)
        hidden = tower.run_to(below, inputs, mask)
        below_flops = 0
        if is_cached:
            _, below_flops, _ = measure(lambda: tower.run_to(below, inputs, mask))
    uncached_flops, whole_flops, uncached_saved = measure(
        lambda: tower(inputs, mask),
        backward=True,
    )
    live_flops = uncached_flops
    saved_bytes = uncached_saved
    if is_cached:
        live_flops, _, saved_bytes = measure(
            lambda: tower.forward_from(below, hidden, mask),
            backward=True,
        )
    n_tokens = hidden.shape[1] if is_cached and below != "pooled" else 0
    reason = tower_cut.reason
    if tower_cut.cut == "pooled" and takes_tokens(head):
        reason = f"nothing within the tower trains: its {n_tokens} tokens are computed once"
    head_flops, head_saved = _measure_head(head, tower, spec, needs_gradient=live_flops > 0)
    n_items = spec.rows * (1 if tower.modality == "image" else spec.captions)
    side = SidePlan(
        side=tower.modality,
        parts=_by_part(matches, tower.modality),
        cut=tower_cut.cut,
        reason=reason,
        cache_bytes=n_items * hidden.numel() * STORED_BYTES if is_cached else 0,
        below_flops=below_flops,
        live_flops=live_flops,
        saved_bytes=saved_bytes,
        tokens=n_tokens,
    )
    return side, ItemCosts(
        whole_flops=whole_flops,
        uncached_flops=uncached_flops,
        uncached_saved=uncached_saved,
        head_flops=head_flops,
        head_saved=head_saved,
        out_dim=head.out_dim,
    )


def _measure_head(
    head: Head,
    tower: Tower,
    spec: PlanSpec,
    needs_gradient: bool,
) -> tuple[int, int]:
    """Return a head's operations, forward and backward, on one item, and its saved bytes.

    Args:
        needs_gradient: whether the head's inputs need one, as the tower below trains.
    """
    shape = (1, _n_tokens(tower, spec), head.in_dim) if takes_tokens(head) else (1, head.in_dim)
    features = torch.zeros(shape, device="meta", requires_grad=needs_gradient)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # a single row has no statistics
    head_flops, _, head_saved = measure(lambda: head(features), backward=True)
    return head_flops, head_saved


def takes_tokens(head: Head) -> bool:
    """Tell whether a head reads tokens, not pooled features."""
    return head.spec.cut == "tokens"


def _n_tokens(tower: Tower, spec: PlanSpec) -> int:
    """Return the number of positions after the last block, whether they are cached or not."""
    with torch.no_grad():
        return int(tower.run_to(tower.n_blocks, *example(tower, spec)).shape[1])


def _below(cut: Cut | None, tower: Tower, head: Head) -> Cut:
    """Return how far a tower is run for the cache."""
    # A head on tokens reads those after the last block, not the pooled output.
    if cut == "pooled" and takes_tokens(head):
        return tower.n_blocks
    return 0 if cut is None else cut


def example(tower: Tower, spec: PlanSpec) -> tuple[Tensor, Tensor | None]:
    """Return the inputs of one item, on the meta device, and their mask (None for an image).

    Raises:
        OptionError: More tokens than the text model has positions for.
    """
    if tower.modality == "image":
        return torch.zeros(1, 3, *tower.image_size, device="meta"), None
    n_positions = count_positions(getattr(tower.module, "config", None))
    if n_positions is not None and spec.tokens > n_positions:
        raise OptionError(
            f"--tokens {spec.tokens}: the text encoder has positions for {n_positions} tokens; "
            f"give --tokens {n_positions} or fewer"
        )
    ids = torch.zeros(1, spec.tokens, dtype=torch.long, device="meta")
    return ids, torch.ones_like(ids)


def measure(run: Callable[[], Tensor], backward: bool = False) -> tuple[int, int, int]:
    """Count the operations of a call and the bytes it keeps for the backward pass.

    Args:
        backward: run the backward pass too, if the output needs a gradient.

    Returns:
        (operations with the backward pass if there is one, operations of the call alone, bytes).
    """
    saved_tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Weights and views of them are saved too, but they are in memory anyway.
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            # By storage: several saved views of one activation take its bytes once.
            saved_tensors[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        output = run()
        forward_flops = int(counter.get_total_flops())
        if backward and output.requires_grad:
            output.sum().backward()
    total_flops = int(counter.get_total_flops())
    saved_bytes = sum(tensor.untyped_storage().nbytes() for tensor in saved_tensors.values())
    return total_flops, forward_flops, saved_bytes


def _by_part(matches: Sequence[FreezeDecision], side: Modality) -> Parts:
    """Return (part, trained, all) of one side, in the order in which the parts come."""
    n_trained: Counter[str] = Counter()
    n_parameters: Counter[str] = Counter()
    for match in matches:
        if match.side == side:
            n_trained[match.part.section] += match.part.count if match.train else 0
            n_parameters[match.part.section] += match.part.count
    return tuple((name, n_trained[name], count) for name, count in n_parameters.items())
