"""Compute what 400 million and 5 billion pairs would take on a cluster: `docs/results/scale.md`.

    python -m benchmarks.cost.scale

Operations, bytes, shards, objects and steps are counted by the planner. Seconds are operations over
the data sheet's rate times an assumed utilization. Nothing here is measured.
"""

import argparse
import math
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformers import BertConfig

from apecache.encoders.load import shape_tower
from apecache.encoders.spec import parse_encoder
from apecache.plan.counting import STORED_BYTES, PlanSpec, SidePlan
from apecache.plan.devices import GB, find_device
from apecache.plan.plan import Plan, plan
from apecache.recipes.recipe import load_recipe
from apecache.store.layout import (
    MAX_SHARD_BYTES,
    PAIR_CHUNK_ROWS,
    PAIR_COLUMNS,
    ArrayLayout,
    chunk_bytes,
)
from apecache.train.resident import USED_SHARE

PAGE = Path(__file__).parents[2] / "docs" / "results" / "scale.md"
IMAGE = "timm:vit_base_patch16_224"
DEVICE = find_device("H100")
N_NODE_DEVICES = 8
UTILIZATION = 0.4
"""Share of the device's rate that is reached, assumed."""
HOUR_PRICE = 2.5
"""Of one device, in any currency, assumed."""
IMAGE_BYTES = 50_000
"""Of one image file, assumed."""
DECODE_RATE = 10_000
"""Images a second that one node reads and decodes, assumed."""
SHARD_ROWS = 32_768
BATCH_SIZE = 32_768
HASH_BYTES = 65
"""Of each row in a commit record: 64 hexadecimal digits and a space."""
UNITS = ((10**12, "TB"), (GB, "GB"), (10**6, "MB"))

INTRODUCTION = f"""# 400 million and 5 billion pairs

**Computed, not measured.** `python -m benchmarks.cost.scale` writes this page. Nothing on it was run
on a cluster or on an {DEVICE.name}. The planner counts operations, bytes, shards, objects and steps.

The image encoder is `{IMAGE}`, the text encoder has the shapes of all-MiniLM-L6-v2. Each image has one
caption. Batches have {BATCH_SIZE:,} images, shards at most {SHARD_ROWS:,} rows and {MAX_SHARD_BYTES >> 20} MiB.

Assumed:

- A device reaches {UTILIZATION} of {DEVICE.flops / 1e12:,.4g} TFLOP/s ({DEVICE.source}).
- An hour of a device costs {HOUR_PRICE}.
- An image file has {IMAGE_BYTES // 1000} kB. A node reads and decodes {DECODE_RATE:,} images a second.
- Extraction on several devices has efficiency 1.0, because shards are independent. Training on
  several devices has efficiency {{efficiency}}. `fit-head` is one process on one device.
- Every training process reads the whole cache once. No row is unreadable.
- Loading encoders and features, evaluation on dev, starts and restarts are not counted.
"""

LIMITS = """
## Limits

- A process that opens a store holds the pair table in memory: 283 bytes for an image and a caption of
  60 characters (`python -m benchmarks.speed.commits`), so 113 GB for 400 million pairs and 1.4 TB for
  5 billion. At such sizes the table has to be cut into several stores.
- Opening a store reads and checks every commit record (the column `records`). The same benchmark
  measures that up to 10,000 shards.
- `fit-head` reads features whole into memory and copies the rows that train. It begins with up to
  twice the bytes of the features.
- `fit-encoder` does not stream pooled features: they must fit on every device. The training times of
  `lit` are what it would take if it did.
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Hold one training set, recipe and cluster."""

    recipe: str
    rows: int
    epochs: int
    nodes: int
    slice_size: int | None = None
    efficiency: float = 1.0
    """Of training: the share of all devices' summed rates that is reached."""

    @property
    def n_devices(self) -> int:
        """Return the number of devices of all nodes."""
        return self.nodes * N_NODE_DEVICES


CASES = (
    Case(recipe="projection", rows=400_000_000, epochs=5, nodes=8),
    Case(recipe="projection", rows=5_000_000_000, epochs=1, nodes=64),
    Case(
        recipe="lit",
        rows=400_000_000,
        epochs=5,
        nodes=8,
        slice_size=4096,
        efficiency=0.9,
    ),
)


@dataclass(frozen=True, kw_only=True)
class CachedArray:
    """Hold the size of one cached array and the time to fill it."""

    modality: str
    row_bytes: int
    data_bytes: int
    record_bytes: int
    n_shards: int
    n_objects: int
    """Chunks and commit records."""
    device_seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the page of computed costs.")
    parser.add_argument("--out", type=Path, default=PAGE)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(), encoding="utf-8")
    print(out)


def page() -> str:
    """Return the page of all cases as Markdown."""
    efficiency = min(case.efficiency for case in CASES)
    sections = [INTRODUCTION.format(efficiency=efficiency)]
    sections += [section(case, plan_case(case)) for case in CASES]
    return "\n".join(sections) + LIMITS


def plan_case(case: Case) -> Plan:
    """Count a case by the planner, on towers without weights."""
    settings = (f"schedule.epochs={case.epochs}", f"schedule.batch_size={BATCH_SIZE}")
    with tempfile.TemporaryDirectory() as folder:
        write_text_config(folder)
        return plan(
            load_recipe(case.recipe, settings),
            image=partial(shape_tower, parse_encoder(IMAGE, "image")),
            text=partial(shape_tower, parse_encoder(f"hf:{folder}", "text")),
            spec=PlanSpec(
                rows=case.rows,
                slice_size=case.slice_size,
                utilization=UTILIZATION,
                price=HOUR_PRICE,
            ),
            device=DEVICE,
        )


def write_text_config(folder: str) -> None:
    """Write the description of all-MiniLM-L6-v2, so that no model hub is needed."""
    BertConfig(
        architectures=["BertModel"],
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
    ).save_pretrained(folder)


def section(case: Case, planned: Plan) -> str:
    """Return the tables of one case: its cache, its stages, and where its features fit."""
    arrays = [
        cached_array(side, case.rows)
        for side in (planned.image, planned.text)
        if side.cut is not None
    ]
    title = (
        f"## {planned.recipe}: {case.rows / 1e6:,.0f} million pairs, {planned.n_steps:,} steps, "
        f"{case.nodes} nodes of {N_NODE_DEVICES} {DEVICE.name}"
    )
    caches = table(
        header=("features", "bytes a row", "data", "records", "shards", "objects", "device hours"),
        rows=[
            (
                array.modality,
                f"{array.row_bytes:,}",
                size(array.data_bytes),
                size(array.record_bytes),
                f"{array.n_shards:,}",
                f"{array.n_objects:,}",
                hours(array.device_seconds),
            )
            for array in arrays
        ],
    )
    stages = table(
        header=("stage", "devices", "device hours", "hours", "cost", "reads", "writes", "objects"),
        rows=stage_rows(case, planned=planned, arrays=arrays),
    )
    return "\n\n".join((title, caches, stages, residence(planned, arrays, case.rows))) + "\n"


def cached_array(side: SidePlan, rows: int) -> CachedArray:
    """Compute the files of one side's pooled features, as extraction lays them out."""
    row_bytes = side.cache_bytes // rows
    shard_rows = min(SHARD_ROWS, rows, MAX_SHARD_BYTES // row_bytes)
    # Batch size and threads do not change the files.
    layout = ArrayLayout(
        rows=rows,
        dim=row_bytes // STORED_BYTES,
        dtype="float16",
        shard_rows=shard_rows,
        batch_size=1,
        threads=1,
        ragged=False,
    )
    chunks = chunk_bytes(layout)
    row_seconds = side.below_flops / DEVICE.flops / UTILIZATION
    if side.side == "image":
        # All devices of a node share its decoding.
        row_seconds = max(row_seconds, N_NODE_DEVICES / DECODE_RATE)
    return CachedArray(
        modality=side.side,
        row_bytes=layout.row_bytes,
        data_bytes=layout.n_shards * sum(chunks.values()),
        record_bytes=rows * HASH_BYTES,
        n_shards=layout.n_shards,
        n_objects=layout.n_shards * (len(chunks) + 1),
        device_seconds=rows * row_seconds,
    )


def stage_rows(case: Case, planned: Plan, arrays: list[CachedArray]) -> list[tuple[str, ...]]:
    """Return the table rows of extraction and of training."""
    stored_bytes = sum(array.data_bytes + array.record_bytes for array in arrays)
    n_objects = sum(array.n_objects for array in arrays)
    # Each column of the pair table has its chunks and a description.
    n_table_objects = len(PAIR_COLUMNS) * (1 + math.ceil(case.rows / PAIR_CHUNK_ROWS))
    n_fit_devices = 1 if planned.path == "fit-head" else case.n_devices
    fit_seconds = planned.n_steps * planned.planned.step_seconds / case.efficiency
    return [
        (
            "extract",
            f"{case.n_devices}",
            *costs(sum(array.device_seconds for array in arrays), case.n_devices),
            size(IMAGE_BYTES * case.rows),
            size(stored_bytes),
            f"{n_objects + n_table_objects:,}",
        ),
        (
            planned.path,
            f"{n_fit_devices}",
            *costs(fit_seconds, n_fit_devices),
            size(n_fit_devices * stored_bytes),
            "heads",
            f"{n_fit_devices * n_objects:,}",
        ),
    ]


def costs(device_seconds: float, n_devices: int) -> tuple[str, str, str]:
    """Return device hours, hours and money."""
    money = HOUR_PRICE * device_seconds / 3600
    return hours(device_seconds), hours(device_seconds / n_devices), f"{money:,.2f}"


def residence(planned: Plan, arrays: list[CachedArray], rows: int) -> str:
    """Say how many devices would hold the features."""
    n_bytes = rows * sum(array.row_bytes for array in arrays)
    memory_bytes = DEVICE.memory_bytes or 0
    usable_bytes = USED_SHARE * memory_bytes if planned.path == "fit-head" else memory_bytes
    room = usable_bytes - planned.planned.peak_bytes
    return (
        f"In training there are {size(n_bytes)} of features. {size(room)} of a device's "
        f"{size(memory_bytes)} are for them, so {math.ceil(n_bytes / room)} devices would hold "
        "them."
    )


def hours(seconds: float) -> str:
    count = seconds / 3600
    return f"{count:,.0f}" if count >= 1000 else f"{count:.4g}"


def size(n_bytes: float) -> str:
    """Format bytes in the largest unit that they fill."""
    for unit, name in UNITS:
        if n_bytes >= unit:
            return f"{n_bytes / unit:,.4g} {name}"
    return f"{n_bytes:,.0f} B"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table."""
    lines = (header, ("---",) * len(header), *rows)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


if __name__ == "__main__":
    main()
