"""A plan at the size of a cluster: hours, money, bytes, objects and requests, and every assumption
behind them.

Computed from a `Plan`, whose operations, bytes and steps are counted, and from rates that were
measured or are a device's operations per second. Nothing here has been run on a cluster.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from apecache.errors import OptionError
from apecache.extraction.arrays import MAX_SHARD_ROWS
from apecache.plan.counting import STORED_BYTES, PlanSpec, SidePlan
from apecache.plan.devices import GB
from apecache.plan.plan import Clock, Cuts, Plan
from apecache.store.layout import (
    MAX_SHARD_BYTES,
    PAIR_CHUNK_ROWS,
    PAIR_COLUMNS,
    ArrayLayout,
    chunk_bytes,
)
from apecache.train.batches import RESIDENT_SHARE

HASH_BYTES = 65
"""Of each row in a commit record: 64 hexadecimal digits and a space. The rest of a record is below
1 kB."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """`nodes` with `devices` devices each.

    `efficiency`: of training on several devices, the share of their rates together that is reached.
    `image_rate`, `text_rate`: rows a second that one device was measured to encode; None: by the
    clock of the plan, or operations over the device's rate. `views`: augmentations of each image
    that are cached in its place. `shard_rows`: of a shard, at most. `image_bytes`: of an image file
    on average; None: reading them is not counted. `decode_rate`: images a second that one node was
    measured to read and decode, beside its devices; None: as many as they encode.
    """

    nodes: int
    devices: int = 1
    efficiency: float = 1.0
    image_rate: float | None = None
    text_rate: float | None = None
    views: int = 1
    shard_rows: int = MAX_SHARD_ROWS
    image_bytes: int | None = None
    decode_rate: float | None = None

    @property
    def n_devices(self) -> int:
        return self.nodes * self.devices


@dataclass(frozen=True, kw_only=True)
class CachedArray:
    """Features of `image`, `text` or `teacher`. `n_bytes`: of data; `record_bytes`: of commit
    records, which hold a hash of every row's input. `n_objects`: data and records.
    `device_seconds`: of encoding all rows on one device."""

    name: str
    rows: int
    row_bytes: int
    n_bytes: int
    record_bytes: int
    shard_rows: int
    n_shards: int
    n_objects: int
    pooled: bool
    device_seconds: float
    rate: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """`hours` on `n_devices` devices; `money` for these device hours, None without a price."""

    n_devices: int
    device_hours: float
    hours: float
    money: float | None


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Extraction of the cache and one training from it, one after the other.

    `write_bytes`, `n_writes`: of extraction, the pair table's columns counted among the objects but
    not in the bytes; what is written is read back once. `source_bytes`: of image files that are
    read (None: not told). `read_bytes`, `n_reads`: of one training; every process of it reads the
    whole cache once. `fits`: whether the features are resident on a device (None: its memory is not
    known); `devices_to_hold`: how many would hold them; `residence`: what follows.
    """

    recipe: str
    path: str
    device: str
    nodes: int
    devices_per_node: int
    rows: int
    captions: int
    n_steps: int
    batch_size: int
    arrays: tuple[CachedArray, ...]
    extraction: Stage
    training: Stage
    write_bytes: int
    n_writes: int
    source_bytes: int | None
    read_bytes: int
    n_reads: int
    fits: bool | None
    devices_to_hold: int | None
    residence: str
    assumptions: tuple[str, ...]

    @property
    def cache_bytes(self) -> int:
        return sum(array.n_bytes for array in self.arrays)


def plan_cluster(
    plan: Plan,
    spec: PlanSpec,
    cluster: ClusterSpec,
    clock: Clock | None = None,
) -> ClusterPlan:
    """`plan` and `clock` as `recipes.plan.plan` made and took them from `spec`.

    Raises:
        OptionError: counts, rates or an efficiency that make no sense; views of images that are not
            cached; more processes than a batch has images.
    """
    _check(plan, cluster)
    arrays = tuple(_arrays(plan, spec=spec, cluster=cluster, clock=clock))
    fit_devices = 1 if plan.path == "fit-head" else cluster.n_devices
    efficiency = 1.0 if fit_devices == 1 else cluster.efficiency
    encoding = sum(array.device_seconds for array in arrays)
    training = plan.n_steps * plan.planned.step_seconds / efficiency
    n_objects = sum(array.n_objects for array in arrays)
    whole = sum(array.n_bytes + array.record_bytes for array in arrays)
    fits, n_hold, residence = _residence(plan, arrays)
    return ClusterPlan(
        recipe=plan.recipe,
        path=plan.path,
        device=plan.device.name,
        nodes=cluster.nodes,
        devices_per_node=cluster.devices,
        rows=spec.rows,
        captions=spec.captions,
        n_steps=plan.n_steps,
        batch_size=plan.batch_size,
        arrays=arrays,
        extraction=_stage(encoding, cluster.n_devices if arrays else 0, spec.price),
        training=_stage(training, fit_devices, spec.price),
        write_bytes=whole,
        n_writes=n_objects + (_table_objects(spec) if arrays else 0),
        source_bytes=None if cluster.image_bytes is None else cluster.image_bytes * spec.rows,
        read_bytes=fit_devices * whole,
        n_reads=fit_devices * n_objects,
        fits=fits,
        devices_to_hold=n_hold,
        residence=residence,
        assumptions=tuple(
            _assumptions(plan, spec=spec, cluster=cluster, arrays=arrays, timed=clock is not None)
        ),
    )


def _check(plan: Plan, cluster: ClusterSpec) -> None:
    positive = (cluster.nodes, cluster.devices, cluster.views, cluster.shard_rows)
    rates = (cluster.image_rate, cluster.text_rate, cluster.image_bytes, cluster.decode_rate)
    if (
        min(positive) < 1
        or not all(rate > 0 for rate in rates if rate is not None)
        or not 0 < cluster.efficiency <= 1
    ):
        raise OptionError(
            f"{cluster}: counts are at least 1, rates and sizes above 0, the efficiency lies "
            "in (0, 1]"
        )
    if cluster.views > 1 and plan.image.cut is None:
        raise OptionError(
            f"--views {cluster.views}: recipe {plan.recipe} caches no images; leave it out"
        )
    if plan.path != "fit-head" and cluster.n_devices > plan.batch_size:
        raise OptionError(
            f"{cluster.n_devices} devices for batches of {plan.batch_size} images; raise "
            "schedule.batch_size, or plan "
            "for fewer nodes"
        )


def _stage(device_seconds: float, n_devices: int, price: float | None) -> Stage:
    hours = device_seconds / 3600
    return Stage(
        n_devices=n_devices,
        device_hours=hours,
        hours=hours / max(1, n_devices),
        money=None if price is None else price * hours,
    )


# --- the cache ------------------------------------------------------------------------------------


def _arrays(
    plan: Plan,
    spec: PlanSpec,
    cluster: ClusterSpec,
    clock: Clock | None,
) -> Iterator[CachedArray]:
    for side in (plan.image, plan.text):
        if side.cut is not None:
            rows = _rows(side, spec)
            views = cluster.views if side.side == "image" else 1
            seconds, why = _encoding(side, plan=plan, spec=spec, cluster=cluster, clock=clock)
            if side.side == "image":
                seconds, why = _decoded(views * seconds, why, cluster)
            pooled = side.tokens == 0
            ragged = side.side == "text" and not pooled
            yield _array(
                side.side,
                row_bytes=side.cache_bytes // rows,
                rows=rows,
                cluster=cluster,
                views=views,
                pooled=pooled,
                ragged=ragged,
                seconds=seconds,
                why=why,
            )
    if plan.teacher_bytes:
        below = sum(side.below_flops * _rows(side, spec) for side in (plan.image, plan.text))
        seconds, why = _decoded(
            *_computed((plan.planned.once_flops - below) // spec.rows, plan, spec),
            cluster,
        )
        row_bytes = plan.teacher_bytes // spec.rows
        yield _array(
            "teacher",
            row_bytes=row_bytes,
            rows=spec.rows,
            cluster=cluster,
            views=1,
            pooled=True,
            ragged=False,
            seconds=seconds,
            why=why,
        )


def _encoding(
    side: SidePlan,
    plan: Plan,
    spec: PlanSpec,
    cluster: ClusterSpec,
    clock: Clock | None,
) -> tuple[float, str]:
    """Seconds of one row (of one view) on one device, and how they come about."""
    rate = cluster.image_rate if side.side == "image" else cluster.text_rate
    if rate is not None:
        return 1 / rate, f"{rate:,.6g} rows a second on each device, as given"
    if clock is None:
        return _computed(side.below_flops, plan, spec)
    cuts: Cuts = (side.cut, None) if side.side == "image" else (None, side.cut)
    seconds = clock.once(cuts) * spec.rows / _rows(side, spec) / spec.utilisation
    return seconds, f"{1 / seconds:,.4g} rows a second, timed on this machine with random weights"


def _decoded(seconds: float, why: str, cluster: ClusterSpec) -> tuple[float, str]:
    """Of one image, no less than its node takes to read and decode it beside the devices."""
    if cluster.decode_rate is None or cluster.devices / cluster.decode_rate <= seconds:
        return seconds, why
    why = (
        f"held up by {cluster.decode_rate:,.6g} images a second that each node decodes, as given; "
        f"else {why}"
    )
    return cluster.devices / cluster.decode_rate, why


def _rows(side: SidePlan, spec: PlanSpec) -> int:
    return spec.rows * (1 if side.side == "image" else spec.captions)


def _computed(flops: int, plan: Plan, spec: PlanSpec) -> tuple[float, str]:
    device = plan.device
    share = spec.utilisation
    why = f"{flops / 1e9:,.4g} GFLOP a row at {share:.4g} of {device.flops / 1e12:,.4g} TFLOP/s"
    return flops / device.flops / share, why


def _array(
    name: str,
    row_bytes: int,
    rows: int,
    cluster: ClusterSpec,
    views: int,
    pooled: bool,
    ragged: bool,
    seconds: float,
    why: str,
) -> CachedArray:
    """`seconds`: of one row. Sizes are those of files; every shard has a chunk of each part, and a
    record."""
    shard_rows = max(1, min(cluster.shard_rows, rows, MAX_SHARD_BYTES // (views * row_bytes)))
    layout = ArrayLayout(
        rows=rows,
        dim=views * row_bytes // STORED_BYTES,
        dtype="float16",
        shard_rows=shard_rows,
        batch_size=1,
        threads=1,
        ragged=ragged,
    )
    n_shards = layout.n_shards
    parts = chunk_bytes(layout)
    n_bytes = n_shards * sum(parts.values())
    n_objects = n_shards * (len(parts) + 1)
    sizes = (layout.row_bytes, n_bytes, rows * HASH_BYTES, shard_rows, n_shards, n_objects)
    (
        row_bytes_value,
        n_bytes_value,
        record_bytes,
        shard_rows_value,
        n_shards_value,
        n_objects_value,
    ) = sizes
    return CachedArray(
        name=name,
        rows=rows,
        row_bytes=row_bytes_value,
        n_bytes=n_bytes_value,
        record_bytes=record_bytes,
        shard_rows=shard_rows_value,
        n_shards=n_shards_value,
        n_objects=n_objects_value,
        pooled=pooled,
        device_seconds=rows * seconds,
        rate=why,
    )


def _table_objects(spec: PlanSpec) -> int:
    """Of the pair table: each column's chunks and its description."""
    rows = {"image": spec.rows, "text": spec.rows * spec.captions}
    return sum(1 + math.ceil(rows[dimension] / PAIR_CHUNK_ROWS) for _, dimension in PAIR_COLUMNS)


# --- what fits, and what was assumed --------------------------------------------------------------


def _residence(plan: Plan, arrays: tuple[CachedArray, ...]) -> tuple[bool | None, int | None, str]:
    """Whether what must be, or had better be, on a device fits there; on how many it would; what
    happens otherwise."""
    head = plan.path == "fit-head"
    kept = [array for array in arrays if head or array.pooled]
    needed = sum(array.rows * array.row_bytes for array in kept)
    device = plan.device
    if not needed:
        return True, 0, "no features have to be on a device"
    if device.memory_bytes is None:
        return None, None, f"{_gb(needed)} GB of features are held in each process's memory"
    room = (
        RESIDENT_SHARE * device.memory_bytes
        if head
        else device.memory_bytes - plan.planned.peak_bytes
    )
    what = f"{_gb(needed)} GB of features"
    if needed <= room:
        return True, 1, f"{what} fit on one {device.name}"
    n_hold = math.ceil(needed / room) if room > 0 else None
    share = f"{_gb(max(0.0, room))} of its {_gb(device.memory_bytes)} GB are for them"
    much = f"{what} do not fit on one {device.name} ({share})"
    spread = f"; {n_hold:,} would hold them" if n_hold else ""
    if head:
        then = (
            f"fit-head keeps them in the host's memory, which must have {_gb(needed)} GB, and "
            "streams batches"
        )
    else:
        then = (
            "fit-encoder does not stream pooled features: take fewer rows, or a recipe of fit-head"
        )
    return False, n_hold, f"{much}{spread}; {then}"


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / GB:,.0f}" if n_bytes >= 1000 * GB else f"{n_bytes / GB:.4g}"


def _demand(array: CachedArray, cluster: ClusterSpec) -> str:
    """What a node must read while it encodes."""
    images = cluster.devices * array.rows / array.device_seconds
    size = cluster.image_bytes
    return f"{images:,.0f} images a second" + (
        "" if size is None else f" ({images * size / GB:,.3g} GB a second)"
    )


def _assumptions(
    plan: Plan,
    spec: PlanSpec,
    cluster: ClusterSpec,
    arrays: tuple[CachedArray, ...],
    timed: bool,
) -> Iterator[str]:
    yield "computed, not run on a cluster"
    for array in arrays:
        yield f"{array.name} encoding: {array.rate}"
    if arrays:
        yield (
            "extraction: parallel efficiency 1.0, as shards are independent; loading encoders "
            "is not counted"
        )
    for array in arrays:
        if array.name != "text" and not timed:
            yield f"reading and decoding keep up: {_demand(array, cluster)} on each node"
    if plan.path == "fit-head":
        yield (
            "training: fit-head is one process on one device; more devices can only try more "
            "settings"
        )
    elif cluster.n_devices > 1:
        yield (
            (
                f"training: parallel efficiency {cluster.efficiency:.4g} on {cluster.n_devices:,} "
                "devices, "
            )
            + ("the most that is possible" if cluster.efficiency == 1 else "as given")
        )
    if timed:
        yield "seconds of a step are those of this machine"
    else:
        yield f"seconds of a step: operations at {spec.utilisation:.4g} of {plan.device.source}"
        if spec.utilisation == 1:
            yield (
                "that is a peak, which nothing reaches: seconds and money are lower bounds "
                "(see --utilisation)"
            )
    yield "loading features, evaluation on dev and restarts are not counted"
    if cluster.image_bytes is None:
        yield "reading the image files is not counted (their mean size is not given)"
    if arrays:
        yield (
            f"shards of at most {cluster.shard_rows:,} rows and {MAX_SHARD_BYTES >> 20} MiB; "
            "no row is unreadable"
        )
        yield "every training process reads the whole cache, from where it lies, once"
