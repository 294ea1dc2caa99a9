"""Counting what a tower does without running it: parameters, operations and bytes, on the meta
device.

Operations are counted with the very parameters switched on that the recipe trains. A multiplication
and an addition are two operations, as in torch's own counter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from apecache.encoders.tower import Cut, Tower
from apecache.fingerprint import Modality
from apecache.heads.head import Head
from apecache.models.freezing import Match, find_cut

STORED_BYTES = 2
"""Of one number in the store (float16)."""
Parts = tuple[tuple[str, int, int], ...]
"""(part, trained, all) parameters."""


@dataclass(frozen=True, kw_only=True)
class PlanSpec:
    """`rows`: images, each with `captions` captions of `tokens` tokens (special ones and padding
    included).

    `slice_size`: how many pairs are in memory at once (None: the whole batch). `utilisation`: share
    of the device's rate that is reached. `price`: of an hour of the device, in any currency; None:
    no costs are given.
    """

    rows: int
    captions: int = 1
    tokens: int = 32
    slice_size: int | None = None
    utilisation: float = 1.0
    price: float | None = None


@dataclass(frozen=True, kw_only=True)
class SidePlan:
    """One tower. `parts`: (part, trained, all) parameters. `cut` None: from the inputs. FLOPs are
    of one image or text: `below_flops` of what the cache saves, `live_flops` of forward and
    backward above the cut in a training step. `saved_bytes`: float32 activations of one item that
    wait for the backward pass. `tokens`: positions of each cached item; 0 where its pooled features
    are cached, or nothing."""

    side: Modality
    parts: Parts
    cut: Cut | None
    reason: str
    cache_bytes: int
    below_flops: int
    live_flops: int
    saved_bytes: int
    tokens: int = 0

    @property
    def n_trained(self) -> int:
        return sum(trained for _, trained, _ in self.parts)

    @property
    def n_parameters(self) -> int:
        return sum(count for _, _, count in self.parts)


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Of one item: the whole forward pass; forward and backward with nothing cached, and
    activations kept then; the same of the head, which no cache changes."""

    whole_flops: int
    uncached_flops: int
    uncached_saved: int
    head_flops: int
    head_saved: int
    out_dim: int


def count_side(
    tower: Tower,
    head: Head,
    matches: Sequence[Match],
    spec: PlanSpec,
) -> tuple[SidePlan, Counted]:
    found = find_cut(matches, tower)
    inputs, mask = example(tower, spec)
    with torch.no_grad():
        below = _below(found.cut, tower, head)
        hidden = tower.run_to(below, inputs, mask)
        below_flops = (
            0 if found.cut is None else measure(lambda: tower.run_to(below, inputs, mask))[1]
        )
    uncached, whole, uncached_saved = measure(lambda: tower(inputs, mask), backward=True)
    if found.cut is None:
        live = uncached
        saved = uncached_saved
    else:
        live, _, saved = measure(lambda: tower.forward_from(below, hidden, mask), backward=True)
    tokens = 0 if found.cut is None or below == "pooled" else hidden.shape[1]
    on_tokens = found.cut == "pooled" and takes_tokens(head)
    shape = (1, _n_tokens(tower, spec), head.in_dim) if takes_tokens(head) else (1, head.in_dim)
    features = torch.zeros(shape, device="meta", requires_grad=live > 0)
    for module in head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.eval()  # a single row has no statistics
    head_flops, _, head_saved = measure(lambda: head(features), backward=True)
    items = spec.rows * (1 if tower.modality == "image" else spec.captions)
    cache = 0 if found.cut is None else items * hidden.numel() * STORED_BYTES
    reason = (
        f"nothing within the tower trains: its {tokens} tokens are computed once"
        if on_tokens
        else found.reason
    )
    counts = (cache, below_flops, live, saved, tokens)
    cache_bytes, below_flops_value, live_flops, saved_bytes, tokens_value = counts
    side = SidePlan(
        side=tower.modality,
        parts=_by_part(matches, tower.modality),
        cut=found.cut,
        reason=reason,
        cache_bytes=cache_bytes,
        below_flops=below_flops_value,
        live_flops=live_flops,
        saved_bytes=saved_bytes,
        tokens=tokens_value,
    )
    return side, Counted(
        whole_flops=whole,
        uncached_flops=uncached,
        uncached_saved=uncached_saved,
        head_flops=head_flops,
        head_saved=head_saved,
        out_dim=head.out_dim,
    )


def takes_tokens(head: Head) -> bool:
    return head.spec.cut == "tokens"


def _n_tokens(tower: Tower, spec: PlanSpec) -> int:
    """Positions after the last block, whether they are cached or not."""
    with torch.no_grad():
        return int(tower.run_to(tower.n_blocks, *example(tower, spec)).shape[1])


def _below(cut: Cut | None, tower: Tower, head: Head) -> Cut:
    """How far a tower is run for the cache; a head on tokens wants those after the last block."""
    if cut == "pooled" and takes_tokens(head):
        return tower.n_blocks
    return 0 if cut is None else cut


def example(tower: Tower, spec: PlanSpec) -> tuple[Tensor, Tensor | None]:
    """Inputs of one item, and their mask."""
    if tower.modality == "image":
        return torch.zeros(1, 3, *tower.image_size, device="meta"), None
    ids = torch.zeros(1, spec.tokens, dtype=torch.long, device="meta")
    return ids, torch.ones_like(ids)


def measure(run: Callable[[], Tensor], backward: bool = False) -> tuple[int, int, int]:
    """(operations with the backward pass if there is one, those of the call alone, bytes kept for
    the backward pass)"""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with (
        FlopCounterMode(display=False) as counter,
        torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
    ):
        out = run()
        forward = int(counter.get_total_flops())
        if backward and out.requires_grad:
            out.sum().backward()
    return (
        int(counter.get_total_flops()),
        forward,
        sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
    )


def _by_part(matches: Sequence[Match], side: Modality) -> Parts:
    """(part, trained, all), in the order in which they come."""
    mine = [match for match in matches if match.side == side]
    names = dict.fromkeys(match.part.place for match in mine)
    counts = {name: [m.part.count for m in mine if m.part.place == name] for name in names}
    trained = {
        name: [m.part.count for m in mine if m.part.place == name and m.train] for name in names
    }
    return tuple((name, sum(trained[name]), sum(counts[name])) for name in names)
