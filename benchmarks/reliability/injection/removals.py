"""Removing a view and compacting the store: what kills, power cuts and failing calls leave of it.

A store gets a block, two views and splits, which are a third view. Then its first view is removed and
the store is compacted. Whatever disturbs this: the newest view stays the newest, every view gives its
rows, the two that stay are never lost, and the same steps, taken again, end as if nothing had
happened.
"""

import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from apecache.errors import ApecacheError, StoreError
from apecache.storage.files import Files
from apecache.storage.local_files import LocalFiles
from apecache.store.compact import compact_store
from apecache.store.reader import FeatureStore
from apecache.store.verify import verify_files
from apecache.store.view_edits import split_store
from apecache.store.views import open_view, read_view_record, remove_view, view_ids
from benchmarks.reliability.injection.power import (
    MOST_WRONG,
    Disk,
    Node,
    PowerResult,
    State,
    Trace,
)
from benchmarks.reliability.injection.syscalls import Fail, intercepted, unsynced
from benchmarks.reliability.injection.tower import (
    EDITED,
    MODALITIES,
    Towers,
    cached_tables,
    run,
    tree,
)

REMOVED = EDITED.images - 1 + EDITED.block.images
"""Images of the view that is removed, by which it is found."""
HALVES = (("train", 0.5), ("val", 0.5))
Values = dict[str, str]
"""What a view gives, by its digest."""


def prepare(files: Files) -> Values:
    """Make the store; return what must be given by each view that stays."""
    with cached_tables():
        run("", EDITED, files=files)
    split_store(files, HALVES)
    values = given(files)
    return {digest: values[digest] for digest in _staying(files)}


def _staying(files: Files) -> list[str]:
    records = [read_view_record(files, view_id) for view_id in view_ids(files)]
    return [record.digest for record in records if record.n_images != REMOVED]


def act(files: Files) -> None:
    """Remove the first view, unless it is gone, and compact the store."""
    for view_id in view_ids(files):
        if read_view_record(files, view_id).n_images == REMOVED:
            remove_view(files, view_id)
    compact_store(files, "0")


def given(files: Files) -> Values:
    """Return what every view gives, by its digest."""
    values: Values = {}
    for view_id in view_ids(files):
        opened = FeatureStore.seen(files, open_view(files, view_id))
        described: list[object] = [opened.pairs.keys.tolist(), opened.pairs.splits.tolist()]
        for modality in MODALITIES:
            array = opened.array(modality)
            described += [array.load(threads=1).tobytes(), array.content(), array.quarantined()]
        values[opened.digest] = repr(described)
    return values


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Hold what must be so after every disturbance."""

    values: Values
    """What the views that stay give."""
    newest: str
    """Digest of the newest view."""

    def violations(self, files: Files) -> list[str]:
        """Return what is not so, of a store that was disturbed."""
        try:
            found = given(files)
            newest = FeatureStore.at(files).digest
        except (ApecacheError, OSError) as error:
            return [f"{type(error).__name__}: {error}"]
        wrong = [
            f"view {digest[:8]} is lost, or gives other rows"
            for digest, value in self.values.items()
            if found.get(digest) != value
        ]
        if newest != self.newest:
            wrong.append("another view is the newest")
        return wrong

    def unfinished(self, files: Files) -> list[str]:
        """Take the same steps again; return what is not as if nothing had happened."""
        act(files)
        wrong = self.violations(files)
        if set(given(files)) != set(self.values):
            wrong.append("the removed view is there again")
        problems = verify_files(files).problems
        if problems:
            wrong.append(f"it does not verify: {problems[0]}")
        if files.list("segments") != ["0002"]:
            wrong.append(f"blocks {files.list('segments')} are left")
        return wrong


def prepared(folder: Path) -> Promise:
    """Make the store in a folder, and return what is promised of it."""
    with intercepted(folder.parent, unsynced()):
        files = LocalFiles(folder)
        values = prepare(files)
    return Promise(values=values, newest=FeatureStore.at(files).digest)


@dataclass(kw_only=True)
class RemovalResult:
    """Count disturbances; `wrong` is what a promise forbids, one line each."""

    faults: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def judge(self, promise: Promise, files: Files, where: str) -> None:
        """Look at a store that was disturbed, take the steps again, and look once more."""
        found = promise.violations(files)
        try:
            found += promise.unfinished(files)
        except (ApecacheError, OSError) as error:
            found.append(f"again: {type(error).__name__}: {error}")
        self.wrong += [f"{where}: {what}" for what in found]


def removal_kills(towers: Towers, folder: Path, count: int, seed: int) -> RemovalResult:
    """SIGKILL at the n-th system call, which is drawn; up to three times in a row on one store."""
    promise = prepared(folder / "prepared")
    chance = random.Random(seed)
    result = RemovalResult()
    while result.faults < count:
        store = folder / "store"
        shutil.copytree(folder / "prepared", store)
        for _ in range(3):
            kill = {
                "nth": chance.randrange(1, 400),
                "when": chance.choice(["before", "halfway", "after"]),
            }
            answer = towers.run(store, spec=EDITED, kill=kill, removal=True)
            if answer["error"]:
                result.wrong.append(f"{kill}: {answer['error']}")
            if not answer["killed"]:
                break
            result.faults += 1
            found = promise.violations(LocalFiles(store))
            result.wrong += [f"{kill}: {what}" for what in found]
        with intercepted(folder, unsynced()):
            result.judge(promise, LocalFiles(store), f"after kill {result.faults}")
        shutil.rmtree(store)
    return result


def removal_cuts(folder: Path, resumes: int, seed: int) -> PowerResult:
    """Cut the power after calls that are drawn; examine a state of each that is drawn, too."""
    promise = prepared(folder / "store")
    before = {f"store/{path}": data for path, data in tree(folder / "store").items()}
    chance = random.Random(seed)
    result = PowerResult()
    shutil.copytree(folder / "store", folder / "counted" / "store")
    n_calls = _calls_of_act(folder / "counted", before, lambda trace: None)
    shutil.rmtree(folder / "counted")
    draws = Counter(chance.choices(range(1, n_calls + 1), k=resumes))
    states: list[tuple[State, int]] = []

    def moment(trace: Trace) -> None:
        if trace.calls in draws:
            found = list(trace.disk.states(chance))
            chosen = chance.sample(found, min(draws[trace.calls], len(found)))
            states.extend((state, trace.calls) for state in chosen)

    result.cuts = _calls_of_act(folder, before, moment)
    judged = RemovalResult()
    for state, number in states:
        store = folder / "cut"
        _write_state(store, state)
        with intercepted(folder, unsynced()):
            judged.judge(promise, LocalFiles(store), f"cut after call {number}")
        result.states += 1
        result.resumed += 1
        shutil.rmtree(store)
        if len(judged.wrong) > MOST_WRONG:
            break
    result.wrong = judged.wrong
    return result


def _calls_of_act(
    folder: Path,
    before: Mapping[str, bytes],
    moment: Callable[[Trace], None],
) -> int:
    """Take the steps on `folder`/store, and call `moment` after each system call; count them."""
    trace = Trace(disk=_written(before), moment=lambda _: None)
    trace.moment = lambda _: moment(trace)
    with intercepted(folder, unsynced(trace)):
        act(LocalFiles(folder / "store"))
    return trace.calls


def _written(files: Mapping[str, bytes]) -> Disk:
    """Return a disk that has these files, all of them durable."""
    disk = Disk()
    for path, data in files.items():
        folder = disk.root
        *parents, name = path.split("/")
        for parent in parents:
            if parent not in folder.entries:
                folder.entries[parent] = Node(folder=True)
                folder.durable[parent] = folder.entries[parent]
                disk.folders.append(folder.entries[parent])
            folder = folder.entries[parent]
        folder.entries[name] = Node(folder=False, data=data, synced=data)
        folder.durable[name] = folder.entries[name]
    return disk


def _write_state(store: Path, state: State) -> None:
    for path, data in state.items():
        target = store / path.partition("/")[2]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


def removal_errors(folder: Path, step: int = 1) -> RemovalResult:
    """Let every `step`-th system call fail in turn."""
    promise = prepared(folder / "prepared")
    result = RemovalResult()
    nth = 1
    while True:
        store = folder / "store"
        shutil.copytree(folder / "prepared", store)
        fail = Fail(nth=nth)
        error: Exception | None = None
        try:
            with intercepted(folder, unsynced(fail)):
                act(LocalFiles(store))
        except Exception as caught:
            error = caught
        if fail.failed is None:
            shutil.rmtree(store)
            return result
        result.faults += 1
        result.kinds[fail.failed.op] += 1
        # What cannot be removed only takes space: the next compaction removes it.
        if error is not None and not isinstance(error, StoreError):
            result.wrong.append(f"{fail.failed}: ended with {type(error).__name__}: {error}")
        with intercepted(folder, unsynced()):
            result.judge(promise, LocalFiles(store), f"call {nth}, {fail.failed.op}")
        shutil.rmtree(store)
        nth += step


def act_at(store: str | os.PathLike[str]) -> list[str]:
    """Take the steps on a store in a folder, as a process that may be killed."""
    act(LocalFiles(Path(store)))
    return []
