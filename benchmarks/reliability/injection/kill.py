"""SIGKILL: at named points and at any moment, several times in a row, and what a resumed run makes
of it."""

import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from apecache.errors import StoreError
from apecache.storage.local_files import LocalFiles
from apecache.store.array import FeatureArray
from apecache.store.reader import FeatureStore
from apecache.store.views import open_view, view_ids, view_number
from benchmarks.reliability.injection.tower import (
    MODALITIES,
    N_KEPT,
    NAME,
    Towers,
    TowerSpec,
    edited_values,
    expected,
    run,
    targets,
    tree_digest,
)

SHARD = 3
POINTS: dict[str, dict[str, Any]] = {
    "before the folder is made": {"op": "mkdir", "pattern": "/records$"},
    "before the source is put": {"op": "link", "pattern": "source.json"},
    "after the source is put": {"op": "unlink", "pattern": "records/.tmp", "when": "after"},
    "halfway through the table": {
        "op": "replace",
        "pattern": "text_caption/zarr.json",
        "when": "after",
    },
    "before the table is put": {"op": "link", "pattern": "pairs.json"},
    "after the array's folder is made": {
        "op": "mkdir",
        "pattern": f"records/image/{NAME}$",
        "when": "after",
    },
    "after the fingerprint": {"op": "link", "pattern": "fingerprint.json", "when": "after"},
    "within zarr's metadata": {"op": "link", "pattern": f"image/{NAME}/features/zarr.json"},
    "halfway through a chunk": {
        "op": "write",
        "pattern": f"image/{NAME}/features/.tmp",
        "when": "halfway",
        "nth": 5,
    },
    "before a chunk is renamed": {"op": "replace", "pattern": rf"features/c\.{SHARD}\.0"},
    "after a chunk is renamed": {
        "op": "replace",
        "pattern": rf"features/c\.{SHARD}\.0",
        "when": "after",
    },
    "between features and status": {"op": "replace", "pattern": rf"status/c\.{SHARD}$"},
    "before the quarantine list": {"op": "replace", "pattern": "quarantine/00000001.jsonl"},
    "halfway through a record": {
        "op": "write",
        "pattern": "commits/.tmp",
        "when": "halfway",
        "nth": SHARD,
    },
    "before the record is linked": {"op": "link", "pattern": f"commits/{SHARD:08d}.json"},
    "after the record is linked": {
        "op": "link",
        "pattern": f"commits/{SHARD:08d}.json",
        "when": "after",
    },
    "after the record is durable": {
        "op": "fsync",
        "pattern": "commits$",
        "when": "after",
        "nth": SHARD + 1,
    },
    "in the other modality": {
        "op": "replace",
        "pattern": rf"text/{NAME}/features/c\.{SHARD}\.0",
        "when": "after",
    },
    "before the seal": {"op": "link", "pattern": f"image/{NAME}/seal.json"},
    "after the last seal": {"op": "link", "pattern": f"text/{NAME}/seal.json", "when": "after"},
}
EDIT_POINTS: dict[str, dict[str, Any]] = {
    "before the block is claimed": {"op": "link", "pattern": "0001/records/source.json"},
    "before the block's table is put": {"op": "link", "pattern": "0001/records/pairs.json"},
    "before the block is recorded": {"op": "link", "pattern": "records/segments/0001.json"},
    "after the block is recorded": {
        "op": "link",
        "pattern": "records/segments/0001.json",
        "when": "after",
    },
    "halfway through the block": {"op": "replace", "pattern": r"0001/.*/features/c\.0\.0"},
    "before the block's seal": {"op": "link", "pattern": f"0001/.*text/{NAME}/seal.json"},
    "halfway through a view": {"op": "link", "pattern": "views/0001-.*/image_key/zarr.json"},
    "before a view is committed": {"op": "link", "pattern": "records/views/0001-"},
    "after a view is committed": {
        "op": "link",
        "pattern": "records/views/0001-",
        "when": "after",
    },
    "before the copy of its record": {"op": "link", "pattern": "views/0001-.*/view.json"},
    "before the last view": {"op": "link", "pattern": "records/views/0002-"},
    "after the last view": {"op": "link", "pattern": "records/views/0002-", "when": "after"},
}


@dataclass(kw_only=True)
class KillResult:
    """`wrong` is what a promise forbids, one line each."""

    kills: int = 0
    stores: int = 0
    redone: int = 0
    wrong: list[str] = field(default_factory=list)


def reference(folder: Path, spec: TowerSpec) -> str:
    """Digest of a store whose writer nobody disturbed."""
    run(folder, spec)
    return tree_digest(folder)


def named_kills(towers: Towers, folder: Path, spec: TowerSpec) -> KillResult:
    """Every named point: one kill, one resume."""
    result = KillResult()
    wanted = reference(folder / "reference", spec)
    points = {**POINTS, **EDIT_POINTS} if spec.edited else POINTS
    for number, (point, kill) in enumerate(points.items()):
        store = folder / f"named-{number}"
        if not kill_once(
            towers,
            store=store,
            spec=spec,
            how={"kill": {"nth": 1, "when": "before", **kill}},
            result=result,
            where=point,
        ):
            result.wrong.append(f"{point}: was never reached")
        finish(towers, store=store, spec=spec, wanted=wanted, result=result, where=point)
    return result


def random_kills(
    towers: Towers,
    folder: Path,
    spec: TowerSpec,
    count: int,
    seed: int,
) -> KillResult:
    """`count` kills, three in a row on one store: by the number of a system call, or from outside
    after some time."""
    chance = random.Random(seed)
    result = KillResult()
    wanted = reference(folder / "reference", spec)
    while result.kills < count:
        store = folder / f"random-{result.stores}"
        for _ in range(3):
            how: dict[str, Any] = {"kill_after": chance.uniform(0, 0.4)}
            if chance.random() < 0.5:
                how = {
                    "kill": {
                        "nth": chance.randrange(1, 500),
                        "when": chance.choice(["before", "halfway", "after"]),
                    }
                }
            if not kill_once(
                towers,
                store=store,
                spec=spec,
                how=how,
                result=result,
                where=f"store {result.stores}, {how}",
            ):
                break
        finish(
            towers,
            store=store,
            spec=spec,
            wanted=wanted,
            result=result,
            where=f"store {result.stores}",
        )
    return result


def kill_once(
    towers: Towers,
    store: Path,
    spec: TowerSpec,
    how: Mapping[str, Any],
    result: KillResult,
    where: str,
) -> bool:
    """Start a run and kill it; what was committed before must not be touched, and what is committed
    must be right."""
    before = committed(store, spec)
    answer = towers.run(store, spec=spec, **how)
    if answer["error"]:
        result.wrong.append(f"{where}: {answer['error']}")
    result.kills += answer["killed"]
    result.wrong += [f"{where}: {what}" for what in check(store, spec, before, begun=1)]
    return bool(answer["killed"])


def finish(
    towers: Towers,
    store: Path,
    spec: TowerSpec,
    wanted: str,
    result: KillResult,
    where: str,
) -> None:
    """A run that nobody kills: it does what is missing, nothing else, and the store is as if
    nothing had happened."""
    before = committed(store, spec)
    answer = towers.run(store, spec=spec, unsynced=True)
    result.stores += 1
    result.redone += len(answer["done"])
    missing = [
        shard
        for name, writer, _ in targets(store, spec)
        for i in range(writer.layout.n_shards)
        if (shard := f"{name}/{i}") not in before
    ]
    if answer["error"] or answer["done"] != missing:
        result.wrong.append(f"{where}: resumed with {answer}, missing was {missing}")
    result.wrong += [f"{where}: {what}" for what in check(store, spec, before, begun=0)]
    if tree_digest(store) != wanted:
        result.wrong.append(f"{where}: the store differs from an undisturbed one")
    shutil.rmtree(store)


State = dict[str, list[tuple[str, int, int]]]
"""Committed shards (`image/3`) and for each of its files name, inode and time of change."""


def committed(store: Path, spec: TowerSpec) -> State:
    found: State = {}
    for array, writer, _ in targets(store, spec):
        modality = writer.record.modality
        for shard, record in writer.committed().items():
            names = [*record.objects, f"records/{modality}/{NAME}/commits/{shard:08d}.json"]
            stats = [(name, Path(writer.files.where(name)).stat()) for name in names]
            found[f"{array}/{shard}"] = [
                (name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats
            ]
    return found


def check(store: Path, spec: TowerSpec, before: State, begun: int) -> list[str]:
    """Every record's shard holds the right rows, none of `before` was written again or lost, and at
    most `begun` shards of each array are begun and not committed."""
    try:
        now = committed(store, spec)
    except (StoreError, OSError) as error:
        return [f"{type(error).__name__}: {error}"]
    wrong = [
        f"{shard} was written again, or lost" for shard in before if now.get(shard) != before[shard]
    ]
    for name, writer, block in targets(store, spec):
        modality = writer.record.modality
        array = FeatureArray(files=writer.files, record=writer.record)
        values = expected(block, modality)
        shards = [int(shard.rpartition("/")[2]) for shard in now if _array_of(shard) == name]
        for shard in shards:
            rows = writer.layout.shard(shard)
            if not np.array_equal(array.load_shard(shard), values[rows], equal_nan=True):
                wrong.append(f"{name}/{shard} holds other rows")
            if array.rows_ok(shard) != [row for row in rows if not np.isnan(values[row]).any()]:
                wrong.append(f"{name}/{shard} has another status")
        chunks = Path(writer.files.where(f"features.zarr/{modality}/{NAME}/features"))
        files = os.listdir(chunks) if chunks.is_dir() else []
        started = {name.split(".")[1] for name in files if name.startswith("c.")} - {
            str(shard) for shard in shards
        }
        if len(started) > begun:
            wrong.append(f"{name}: {len(started)} shards begun and not committed")
    return wrong + (_check_views(store, spec) if spec.edited else [])


def _array_of(shard: str) -> str:
    return shard.rpartition("/")[0]


def _check_views(store: Path, spec: TowerSpec) -> list[str]:
    """Every committed view gives its rows; a reader sees the first table until there is one."""
    wrong = []
    files = LocalFiles(store)
    for view_id in view_ids(files):
        opened = FeatureStore.seen(files, open_view(files, view_id))
        n_kept = spec.images - 1 if view_number(view_id) == 1 else N_KEPT
        for modality in MODALITIES:
            loaded = opened.array(modality).load(threads=1)
            if not np.array_equal(loaded, edited_values(spec, modality, n_kept), equal_nan=True):
                wrong.append(f"view {view_id} gives other rows of {modality}")
    if not view_ids(files) and (store / f"records/text/{NAME}/seal.json").is_file():
        for modality in MODALITIES:
            loaded = FeatureStore.at(files).array(modality).load(threads=1)
            if not np.array_equal(loaded, expected(spec, modality), equal_nan=True):
                wrong.append(f"without a view, {modality} has other rows")
    return wrong
