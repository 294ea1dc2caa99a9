"""Towers that write to object storage which fails again and again, and what must hold
afterwards."""

import contextlib
import random
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from remote import KINDS, Faults, S3Server

from apecache.errors import StoreError
from apecache.storage.files import TEMPORARY, Files
from apecache.storage.open import open_files
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_files
from benchmarks.reliability.injection.removals import act, prepare, prepared
from benchmarks.reliability.injection.tower import MODALITIES, Towers, TowerSpec, run, tree

LIKELY = (*KINDS, *(kind for kind in KINDS if kind != "stall"))
"""Time-outs are slow."""


@dataclass(kw_only=True)
class RemoteResult:
    runs: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    killed: int = 0
    wrong: list[str] = field(default_factory=list)


def objects(files: Files) -> dict[str, bytes]:
    """Every object of a place."""
    names = files.sizes("")
    return dict(zip(names, files.read_all(names), strict=True))


def faulty_runs(
    server: S3Server,
    folder: Path,
    spec: TowerSpec,
    faults: int,
    share: float,
    seed: int,
) -> RemoteResult:
    """Stores made one after another, every third by two writers at once, until so many faults were
    injected."""
    run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    result = RemoteResult()
    while sum(result.faults.values()) < faults:
        place = server.new_bucket() + "/store"
        with server.faults(Faults(share, LIKELY, seed + result.runs)) as injected:
            errors = _write(place, spec, writers=1 + (result.runs % 3 == 2))
        result.faults += injected.counts
        result.runs += 1
        result.wrong += [
            f"run {result.runs}: {what}" for what in (*errors, *_wrong(place, spec, wanted))
        ]
    return result


def _write(place: str, spec: TowerSpec, writers: int) -> list[str]:
    errors: list[str] = []

    def work() -> None:
        try:
            run(place, spec)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def _wrong(place: str, spec: TowerSpec, wanted: dict[str, bytes]) -> list[str]:
    """What does not hold of a finished store; of a killed writer a trial of put-if-absent may be
    left."""
    wrong = []
    store = FeatureStore.open(place)
    found = {
        name: data for name, data in objects(store.files).items() if not name.startswith(TEMPORARY)
    }
    if found != wanted:
        names = sorted(
            name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)
        )
        wrong.append(f"it differs from that of a folder: {names}")
    for modality in MODALITIES:
        rows = [
            row for commit in store.array(modality).commits.values() for row in range(*commit.rows)
        ]
        if sorted(rows) != list(range(spec.rows(modality))):
            wrong.append(f"{modality}: rows are missing, or are there twice")
    if not verify_files(store.files).sound:
        wrong.append("it does not verify")
    return wrong


def faulty_removals(
    server: S3Server,
    folder: Path,
    rounds: int,
    share: float,
    seed: int,
) -> RemoteResult:
    """Views removed and stores compacted on object storage that fails, then again without faults."""
    promise = prepared(folder / "reference")
    result = RemoteResult()
    for number in range(rounds):
        files = open_files(server.new_bucket() + "/store")
        prepare(files)
        faults = Faults(share, LIKELY, seed + number)
        # A request that failed too often ends the command: what was done stands.
        with server.faults(faults) as injected, contextlib.suppress(StoreError):
            act(files)
        result.faults += injected.counts
        result.runs += 1
        wrong = promise.violations(files)
        wrong += promise.unfinished(files)
        result.wrong += [f"round {number}: {what}" for what in wrong]
    return result


def killed_runs(
    towers: Towers,
    server: S3Server,
    folder: Path,
    spec: TowerSpec,
    kills: int,
    seed: int,
) -> RemoteResult:
    """Two processes at a time write one store; one of them is killed at some moment, until so many
    were."""
    run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    result = RemoteResult()
    chance = random.Random(seed)
    while result.killed < kills and result.runs < 3 * kills:
        place = server.new_bucket() + "/store"
        one = {"store": place, "spec": spec, "environment": server.environment()}
        answers = towers.start({**one, "kill_after": chance.uniform(0.05, 0.5)}, one)
        result.killed += sum(answer["killed"] for answer in answers)
        result.runs += 1
        errors = [answer["error"] for answer in answers if answer["error"]]
        again = run(place, spec)
        errors += [f"left undone: {again}"] if again else []
        result.wrong += [
            f"run {result.runs}: {what}" for what in (*errors, *_wrong(place, spec, wanted))
        ]
    return result
