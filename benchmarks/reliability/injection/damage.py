"""Damage to the files of a finished store, and what reading makes of it.

Reading covers what it serves. It does not look at `UNREAD`: the README and Zarr's metadata of the
feature arrays, which other readers use (the shape and layout that we read by stand in
fingerprint.json). `apecache verify` covers those.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from apecache.errors import MismatchError, StoreError
from apecache.fingerprint import content_hash
from apecache.store.reader import FeatureStore
from apecache.store.table import COLUMN_OF_FIELD, PairTable
from benchmarks.reliability.injection.tower import MODALITIES, NAME, tree

UNREAD = frozenset(
    (
        "README.md",
        *(
            f"features.zarr/{m}/{NAME}/{part}zarr.json"
            for m in MODALITIES
            for part in ("", "features/", "status/")
        ),
    )
)
Served = dict[str, str | Exception]
"""For each thing that can be read: the hash of what was served, or the error."""


def things(store: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Everything that a store serves, each opened anew. Arrays are named, as a user who knows the
    store names them."""
    yield "source", lambda: FeatureStore.open(store).source
    yield "pairs", lambda: all_columns(FeatureStore.open(store).pairs)
    for m in MODALITIES:
        yield f"{m} features", lambda m=m: FeatureStore.open(store).array(m, NAME).load(threads=1)
        yield f"{m} status", lambda m=m: FeatureStore.open(store).array(m, NAME).load_ok()
        yield f"{m} quarantined", lambda m=m: FeatureStore.open(store).array(m, NAME).quarantined()
        yield f"{m} record", lambda m=m: FeatureStore.open(store).array(m, NAME).record.to_json()


def all_columns(pairs: PairTable) -> dict[str, Any]:
    """Read every column of a table."""
    return {name: getattr(pairs, name) for name in COLUMN_OF_FIELD}


def serve(store: Path, without: Collection[str] = ()) -> Served:
    return {name: _attempt(read) for name, read in things(store) if name not in without}


def _attempt(read: Callable[[], Any]) -> str | Exception:
    try:
        return _digest(read())
    except Exception as error:
        return error


def _digest(value: Any) -> str:
    if isinstance(value, np.ndarray) and value.dtype != object:
        return content_hash(value.tobytes() + str((value.dtype, value.shape)).encode())
    if isinstance(value, dict):
        return content_hash(
            "".join(f"{key}:{_digest(part)};" for key, part in sorted(value.items()))
        )
    return content_hash(repr(value.tolist() if isinstance(value, np.ndarray) else value))


def covering(name: str) -> set[str]:
    """The things that cannot be served with this object damaged."""
    parts = name.split("/")
    if name in UNREAD:
        return set()
    if name == "records/source.json":
        return {"source", "pairs"}
    if name == "records/pairs.json":
        return {
            "source",
            "pairs",
            *(
                f"{m} {part}"
                for m in MODALITIES
                for part in ("features", "status", "quarantined", "record")
            ),
        }
    if name.startswith("features.zarr/pairs/") or len(parts) <= 3:
        return {"pairs"}
    modality = parts[1]
    if parts[0] == "features.zarr":
        return {f"{modality} {parts[3]}"}
    whole = {f"{modality} features", f"{modality} status"}
    match parts[3]:
        case "seal.json":
            return whole
        case "quarantine":
            return {f"{modality} quarantined"}
        case "commits":
            return {*whole, f"{modality} quarantined"}
        case _:
            return {*whole, f"{modality} quarantined", f"{modality} record"}


Change = Callable[[random.Random, bytes], bytes | None]


def flip(chance: random.Random, data: bytes) -> bytes:
    bit = chance.randrange(8 * len(data))
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def truncate(chance: random.Random, data: bytes) -> bytes:
    return data[: chance.randrange(len(data))]


def enlarge(chance: random.Random, data: bytes) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 20))


def zero(chance: random.Random, data: bytes) -> bytes:
    """A block that never reached the disk."""
    begin = chance.randrange(len(data))
    return data[:begin] + bytes(len(data) - begin)


CHANGES: dict[str, Change] = {
    "flip": flip,
    "truncate": truncate,
    "empty": lambda _, __: b"",
    "enlarge": enlarge,
    "zero": zero,
    "delete": lambda _, __: None,
}


def strike(store: Path, chance: random.Random) -> tuple[str, list[str]]:
    """Damage one object, or swap two; returns what was done and the objects that now have other
    bytes."""
    files = tree(store)
    kind = chance.choice([*CHANGES, "swap", "copy"])
    if kind in ("swap", "copy"):
        name, other = _alike(files, chance)
        after = {name: files[other], **({other: files[name]} if kind == "swap" else {})}
    else:
        name = chance.choice(sorted(files))
        after = {name: CHANGES[kind](chance, files[name])}
    for changed, data in after.items():
        put(store, changed, data)
    return f"{kind} {', '.join(after)}", [
        changed for changed, data in after.items() if data != files[changed]
    ]


def _alike(files: dict[str, bytes], chance: random.Random) -> tuple[str, str]:
    """Two objects; mostly of one folder, for those are the likeliest to be taken for one
    another."""
    name = chance.choice(sorted(files))
    beside = [
        other
        for other in sorted(files)
        if other != name and Path(other).parent == Path(name).parent
    ]
    others = (
        beside
        if beside and chance.random() < 0.8
        else [other for other in sorted(files) if other != name]
    )
    return name, chance.choice(others)


def put(store: Path, name: str, data: bytes | None) -> None:
    if data is None:
        (store / name).unlink()
    else:
        (store / name).write_bytes(data)


def judge(before: Served, after: Served, damaged: list[str]) -> list[str]:
    """What went wrong: other rows served, an error of another kind, or damage that nobody noticed.

    A damaged record may still say the same (JSON has several spellings); any other covered object
    must be found out.
    """
    wrong = []
    for thing, value in after.items():
        if isinstance(value, Exception):
            if not isinstance(value, StoreError | MismatchError) or "\n" in str(value):
                wrong.append(f"{thing}: {type(value).__name__}: {value}")
        elif value != before[thing]:
            wrong.append(f"{thing}: served otherwise")
    for name in damaged:
        unnoticed = [
            thing for thing in covering(name) if not isinstance(after.get(thing), Exception)
        ]
        if unnoticed and not name.endswith(".json"):
            wrong.append(f"{name}: not noticed by {', '.join(unnoticed)}")
    return wrong


def damages(store: Path, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Strike a copy of a finished store `count` times, mending it in between.

    Returns how many strikes were `noticed`, left everything `the same`, or hit what is `not read`;
    and what went wrong.
    """
    chance = random.Random(seed)
    outcomes = Counter[str]()
    wrong = []
    before = serve(store)
    whole = tree(store)
    for number in range(count):
        done, damaged = strike(store, chance)
        # The table is slow to read, and seldom concerned.
        table = number % 5 == 0 or any("pairs" in covering(name) for name in damaged)
        after = serve(store, without=() if table else ("pairs",))
        wrong += [f"{number}: {done}: {what}" for what in judge(before, after, damaged)]
        noticed = any(isinstance(value, Exception) for value in after.values())
        unread = bool(damaged) and set(damaged) <= UNREAD
        outcomes["noticed" if noticed else "not read" if unread else "the same"] += 1
        for name in done.split(" ", 1)[1].split(", "):
            put(store, name, whole[name])
    return outcomes, wrong
