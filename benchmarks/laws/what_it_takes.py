"""What it would take to test each law at the size of its paper: hours on one H100, computed.

Upper bounds of one arm: both towers run from their inputs and train, forward and backward, at 0.4 of
the peak of the data sheet. Arms that freeze a tower, or read it from the cache, take less.
"""

from dataclasses import dataclass

from apecache.plan.devices import block_flops, find_device
from benchmarks.laws.law import load_law

UTILIZATION = 0.4
SEEDS = 3
LILT_SAMPLES = 69_345 * 128
"""15 epochs of COCO's 591,753 pairs."""
FREEZE_SAMPLES = 12_800_000
SHARED_SAMPLES = 7 * 591_753
"""Seven epochs; the paper's data are not in our copy, so COCO is taken."""
BERT = 12 * block_flops(768, 25)
VIT_256 = 12 * block_flops(768, 257)
VIT_224 = 12 * block_flops(768, 197)


@dataclass(frozen=True, kw_only=True)
class PaperSize:
    laws: tuple[str, ...]
    samples: int
    forward_flops: int
    what: str


SIZES = (
    PaperSize(
        laws=("L1", "L2", "L5", "L7", "L8", "L9"),
        samples=LILT_SAMPLES,
        forward_flops=VIT_256 + BERT,
        what="LilT: ViT-B/16 at 256 pixels and BERT-base, 69,345 steps of 128",
    ),
    PaperSize(
        laws=("L3", "L4"),
        samples=FREEZE_SAMPLES,
        forward_flops=VIT_224 + BERT,
        what="DataComp small: ViT-B/16 at 224 pixels and BERT-base, 12.8 M samples",
    ),
    PaperSize(
        laws=("L10",),
        samples=SHARED_SAMPLES,
        forward_flops=(VIT_224 + BERT) // 2 + block_flops(768, 197) + block_flops(768, 25),
        what="shared encoder: six blocks of each tower, seven epochs of COCO",
    ),
)
OTHERS = (
    ("L6", "LiT and APE: the number of samples is not in our copy of the poster"),
    ("L11", "heads on cached features: minutes on a CPU for each arm and seed"),
    ("L12", "counts need no run; costs for each point of recall need those of L1"),
)


def hours(size: PaperSize) -> float:
    """Of one arm with one seed."""
    rate = UTILIZATION * find_device("H100").flops
    return 3 * size.forward_flops * size.samples / rate / 3600


def rows() -> list[tuple[str, ...]]:
    """A row for each law: law, size, hours of an arm, arms and seeds, hours in all."""
    found = []
    for size in SIZES:
        for name in size.laws:
            n_arms = len(load_law(name).arms)
            one = hours(size)
            runs = f"{n_arms} x {SEEDS}"
            found.append((name, size.what, f"{one:.2f}", runs, f"{n_arms * SEEDS * one:.1f}"))
    found += [(name, what, "", "", "") for name, what in OTHERS]
    return sorted(found, key=lambda row: int(row[0][1:]))
