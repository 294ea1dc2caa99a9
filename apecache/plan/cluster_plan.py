"""Plan extraction and training on a cluster: hours, money, bytes, objects, requests, assumptions.

All is computed from a `Plan`, whose operations, bytes and steps are counted, and from rates: those
that a user measured, or a device's operations a second. Nothing here has been run on a cluster.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from apecache.errors import OptionError
from apecache.extraction.arrays import MAX_SHARD_ROWS
from apecache.plan.counting import STORED_BYTES, PlanSpec, SidePlan
from apecache.plan.devices import GB
from apecache.plan.plan import Cuts, Plan, PlanTimer
from apecache.store.layout import (
    MAX_SHARD_BYTES,
    PAIR_CHUNK_ROWS,
    PAIR_COLUMNS,
    ArrayLayout,
    chunk_bytes,
)
from apecache.train.batches import RESIDENT_SHARE

HASH_BYTES = 65
"""Bytes of each row in a commit record: 64 hexadecimal digits and a space. All else in a record is
below 1 kB."""


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """Describe a cluster and the rates that were measured on it."""

    nodes: int
    devices: int = 1
    """Of each node."""
    efficiency: float = 1.0
    """Of training on several devices: the share of their summed rates that is reached."""
    image_rate: float | None = None
    """Images a second that one device encodes, as measured; None: by the clock of the plan, or
    operations over the device's rate."""
    text_rate: float | None = None
    """The same for texts."""
    views: int = 1
    """Augmentations of each image that are cached in place of the image."""
    shard_rows: int = MAX_SHARD_ROWS
    """Rows of a shard, at most."""
    image_bytes: int | None = None
    """Mean size of an image file; None: reading the files is not counted."""
    decode_rate: float | None = None
    """Images a second that one node reads and decodes beside its devices, as measured; None: as
    many as its devices encode."""

    @property
    def n_devices(self) -> int:
        """Return the number of devices of all nodes."""
        return self.nodes * self.devices


@dataclass(frozen=True, kw_only=True)
class CachedArray:
    """Hold the size of one cached array and the time to fill it."""

    name: str
    """`image`, `text` or `teacher`."""
    rows: int
    row_bytes: int
    n_bytes: int
    """Of the data of all shards."""
    record_bytes: int
    """Of all commit records, which hold a hash of every row's input."""
    shard_rows: int
    n_shards: int
    n_objects: int
    """Data and commit records."""
    pooled: bool
    device_seconds: float
    """Of encoding all rows on one device."""
    rate: str
    """How the seconds come about, for the list of assumptions."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Hold how long a stage runs on the cluster and what it costs."""

    n_devices: int
    device_hours: float
    hours: float
    """From begin to end, on all devices at once."""
    money: float | None
    """For the device hours; None without a price."""


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Hold the plan of an extraction and one training from its cache, one after the other."""

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
    """Of extraction, without the pair table. All that is written is also read back once."""
    n_writes: int
    """Of extraction: objects, those of the pair table included."""
    source_bytes: int | None
    """Of the image files that are read; None: their mean size is not given."""
    read_bytes: int
    """Of one training: each of its processes reads the whole cache once."""
    n_reads: int
    """Objects read in one training."""
    fits: bool | None
    """Whether the features are resident on one device; None: its memory is not known."""
    devices_to_hold: int | None
    """Devices whose memory would hold the features; None: not known, or no number of them."""
    residence: str
    """What follows from `fits`, in words."""
    assumptions: tuple[str, ...]

    @property
    def cache_bytes(self) -> int:
        """Return the bytes of all cached features, without commit records."""
        return sum(array.n_bytes for array in self.arrays)


def plan_cluster(
    plan: Plan,
    spec: PlanSpec,
    cluster: ClusterSpec,
    clock: PlanTimer | None = None,
) -> ClusterPlan:
    """Plan the extraction and training of a `Plan` on a cluster.

    Args:
        plan: made by `apecache.plan.plan.plan` with the same `spec`.
        clock: the one that `plan` was made with, if any.

    Raises:
        OptionError: counts, rates or an efficiency that make no sense; views of images that are not
            cached; more processes than a batch has images.
    """
    _check(plan, cluster)
    arrays = tuple(_arrays(plan, spec=spec, cluster=cluster, clock=clock))
    # fit-head is one process: the other devices stay idle while it trains.
    fit_devices = 1 if plan.path == "fit-head" else cluster.n_devices
    efficiency = 1.0 if fit_devices == 1 else cluster.efficiency
    encode_seconds = sum(array.device_seconds for array in arrays)
    train_seconds = plan.n_steps * plan.planned.step_seconds / efficiency
    n_objects = sum(array.n_objects for array in arrays)
    stored_bytes = sum(array.n_bytes + array.record_bytes for array in arrays)
    fits, n_hold, residence = _residence(plan, arrays)
    assumptions = _assumptions(
        plan,
        spec=spec,
        cluster=cluster,
        arrays=arrays,
        timed=clock is not None,
    )
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
        extraction=_stage(encode_seconds, cluster.n_devices if arrays else 0, spec.price),
        training=_stage(train_seconds, fit_devices, spec.price),
        write_bytes=stored_bytes,
        n_writes=n_objects + (_table_objects(spec) if arrays else 0),
        source_bytes=None if cluster.image_bytes is None else cluster.image_bytes * spec.rows,
        read_bytes=fit_devices * stored_bytes,
        n_reads=fit_devices * n_objects,
        fits=fits,
        devices_to_hold=n_hold,
        residence=residence,
        assumptions=tuple(assumptions),
    )


def _check(plan: Plan, cluster: ClusterSpec) -> None:
    positive = (cluster.nodes, cluster.devices, cluster.views, cluster.shard_rows)
    rates = (cluster.image_rate, cluster.text_rate, cluster.image_bytes, cluster.decode_rate)
    rates_are_valid = all(rate > 0 for rate in rates if rate is not None)
    if min(positive) < 1 or not rates_are_valid or not 0 < cluster.efficiency <= 1:
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
    clock: PlanTimer | None,
) -> Iterator[CachedArray]:
    for side in (plan.image, plan.text):
        if side.cut is None:
            continue
        rows = _rows(side, spec)
        views = cluster.views if side.side == "image" else 1
        seconds, why = _encoding(side, plan=plan, spec=spec, cluster=cluster, clock=clock)
        if side.side == "image":
            seconds, why = _decoded(views * seconds, why, cluster)
        pooled = side.tokens == 0
        yield _array(
            side.side,
            row_bytes=side.cache_bytes // rows,
            rows=rows,
            cluster=cluster,
            views=views,
            pooled=pooled,
            # Texts differ in their number of tokens, which one more array holds.
            ragged=side.side == "text" and not pooled,
            seconds=seconds,
            why=why,
        )
    if plan.teacher_bytes:
        # The plan has only the sum of what is computed once; all but the two towers is the teacher.
        towers_flops = sum(side.below_flops * _rows(side, spec) for side in (plan.image, plan.text))
        teacher_flops = (plan.planned.once_flops - towers_flops) // spec.rows
        seconds, why = _computed(teacher_flops, plan, spec)
        seconds, why = _decoded(seconds, why, cluster)
        yield _array(
            "teacher",
            row_bytes=plan.teacher_bytes // spec.rows,
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
    clock: PlanTimer | None,
) -> tuple[float, str]:
    """Return the seconds of one row (of one view) on one device, and how they come about."""
    rate = cluster.image_rate if side.side == "image" else cluster.text_rate
    if rate is not None:
        return 1 / rate, f"{rate:,.6g} rows a second on each device, as given"
    if clock is None:
        return _computed(side.below_flops, plan, spec)
    cuts: Cuts = (side.cut, None) if side.side == "image" else (None, side.cut)
    # The clock gives seconds of an image with all its captions; a row is one of the captions.
    seconds = clock.once(cuts) * spec.rows / _rows(side, spec) / spec.utilization
    return seconds, f"{1 / seconds:,.4g} rows a second, timed on this machine with random weights"


def _decoded(seconds: float, why: str, cluster: ClusterSpec) -> tuple[float, str]:
    """Return the seconds of one image on one device, limited by how fast its node decodes."""
    if cluster.decode_rate is None:
        return seconds, why
    # All devices of a node share its decoding.
    decode_seconds = cluster.devices / cluster.decode_rate
    if decode_seconds <= seconds:
        return seconds, why
    held_up = (
        f"held up by {cluster.decode_rate:,.6g} images a second that each node decodes, as given; "
        f"else {why}"
    )
    return decode_seconds, held_up


def _rows(side: SidePlan, spec: PlanSpec) -> int:
    return spec.rows * (1 if side.side == "image" else spec.captions)


def _computed(flops: int, plan: Plan, spec: PlanSpec) -> tuple[float, str]:
    """Return the seconds of one row at the device's rate, and how they come about."""
    device = plan.device
    share = spec.utilization
    why = f"{flops / 1e9:,.4g} GFLOP a row at {share:.4g} of {device.flops / 1e12:,.4g} TFLOP/s"
    seconds = flops / device.flops / share
    return seconds, why


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
    """Compute the files of one array: every shard has one chunk for each of its parts and a record.

    Args:
        row_bytes: of one view.
        seconds: of one row.
    """
    rows_within_size = MAX_SHARD_BYTES // (views * row_bytes)
    # One row may be larger than a shard should be, but a shard has at least one.
    shard_rows = max(1, min(cluster.shard_rows, rows, rows_within_size))
    # Batch size and threads do not change the files; the layout only needs some.
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
    chunks = chunk_bytes(layout)
    return CachedArray(
        name=name,
        rows=rows,
        row_bytes=layout.row_bytes,
        n_bytes=n_shards * sum(chunks.values()),
        record_bytes=rows * HASH_BYTES,
        shard_rows=shard_rows,
        n_shards=n_shards,
        n_objects=n_shards * (len(chunks) + 1),
        pooled=pooled,
        device_seconds=rows * seconds,
        rate=why,
    )


def _table_objects(spec: PlanSpec) -> int:
    """Count the objects of the pair table: each column's chunks and its description."""
    rows = {"image": spec.rows, "text": spec.rows * spec.captions}
    n_objects = 0
    for _, dimension in PAIR_COLUMNS:
        n_chunks = math.ceil(rows[dimension] / PAIR_CHUNK_ROWS)
        n_objects += 1 + n_chunks
    return n_objects


# --- what fits, and what was assumed --------------------------------------------------------------


def _residence(plan: Plan, arrays: tuple[CachedArray, ...]) -> tuple[bool | None, int | None, str]:
    """Find whether the features fit on a device.

    Returns:
        (whether they fit, devices that would hold them, what follows in words); the first two are
        None where they are not known.
    """
    heads_alone = plan.path == "fit-head"
    # fit-encoder keeps only pooled features on the device; tokens are read for each batch.
    resident = [array for array in arrays if heads_alone or array.pooled]
    needed_bytes = sum(array.rows * array.row_bytes for array in resident)
    device = plan.device
    if not needed_bytes:
        return True, 0, "no features have to be on a device"
    if device.memory_bytes is None:
        return None, None, f"{_gb(needed_bytes)} GB of features are held in each process's memory"
    free_bytes = device.memory_bytes - plan.planned.peak_bytes
    room = RESIDENT_SHARE * device.memory_bytes if heads_alone else free_bytes
    features = f"{_gb(needed_bytes)} GB of features"
    if needed_bytes <= room:
        return True, 1, f"{features} fit on one {device.name}"
    n_hold = math.ceil(needed_bytes / room) if room > 0 else None
    share = f"{_gb(max(0.0, room))} of its {_gb(device.memory_bytes)} GB are for them"
    misfit = f"{features} do not fit on one {device.name} ({share})"
    spread = f"; {n_hold:,} would hold them" if n_hold else ""
    if heads_alone:
        advice = (
            f"fit-head keeps them in the host's memory, which must have {_gb(needed_bytes)} GB, "
            "and streams batches"
        )
    else:
        advice = (
            "fit-encoder does not stream pooled features: take fewer rows, or a recipe of fit-head"
        )
    return False, n_hold, f"{misfit}{spread}; {advice}"


def _gb(n_bytes: float) -> str:
    # `.4g` alone would write 10,000 and more with an exponent.
    return f"{n_bytes / GB:,.0f}" if n_bytes >= 1000 * GB else f"{n_bytes / GB:.4g}"


def _demand(array: CachedArray, cluster: ClusterSpec) -> str:
    """Say what a node must read while its devices encode."""
    image_rate = cluster.devices * array.rows / array.device_seconds
    demand = f"{image_rate:,.0f} images a second"
    if cluster.image_bytes is None:
        return demand
    return f"{demand} ({image_rate * cluster.image_bytes / GB:,.3g} GB a second)"


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
        # A clock times decoding with encoding, so nothing is assumed about it then.
        if array.name != "text" and not timed:
            yield f"reading and decoding keep up: {_demand(array, cluster)} on each node"
    if plan.path == "fit-head":
        yield (
            "training: fit-head is one process on one device; more devices can only try more "
            "settings"
        )
    elif cluster.n_devices > 1:
        origin = "the most that is possible" if cluster.efficiency == 1 else "as given"
        yield (
            f"training: parallel efficiency {cluster.efficiency:.4g} on {cluster.n_devices:,} "
            f"devices, {origin}"
        )
    if timed:
        yield "seconds of a step are those of this machine"
    else:
        yield f"seconds of a step: operations at {spec.utilization:.4g} of {plan.device.source}"
        if spec.utilization == 1:
            yield (
                "that is a peak, which nothing reaches: seconds and money are lower bounds "
                "(see --utilization)"
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
