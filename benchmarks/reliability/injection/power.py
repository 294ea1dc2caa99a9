"""Power cuts: every state in which a disk may be found, from a recorded trace of the writer's
system calls.

The model is the weakest that POSIX allows, weaker than any file system in use:

- A folder's entries (changed by open, mkdir, rmdir, link, replace, unlink) are durable only after fsync of that folder. Of those
  changed since, any subset may have reached the disk, in any order; one replace is atomic.
- A file's bytes are durable only after fsync of the file. Of one written since, the entry may point to all of them, to
  the bytes of the last fsync, to none, to zeros, or to the first half.
- fsync of a file does not make its entry durable, fsync of a folder does not make the bytes of its files durable.
- What is durable stays; an entry whose folder was lost is lost with it.

A kill alone loses nothing of this: what a killed process did is still in memory, and lost by a cut
that comes later. So besides a run that is cut at every call, runs are traced that finish what a
killed one began.
"""

import ast
import inspect
import itertools
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apecache.storage import local_files as local_module
from apecache.storage.files import TEMPORARY
from apecache.storage.local_files import LocalFiles
from benchmarks.reliability.injection.kill import check
from benchmarks.reliability.injection.syscalls import (
    Call,
    SimulatedKill,
    Stop,
    intercepted,
    unsynced,
)
from benchmarks.reliability.injection.tower import (
    BLOCK,
    MODALITIES,
    NAME,
    TowerSpec,
    array_record,
    cached_tables,
    run,
    tree,
)

State = dict[str, bytes]
"""Files by path below the store, as found after the cut. Folders that hold none are of no
consequence."""

MOST_STATES = 256
MOST_ENTRIES = 5
MOST_WRONG = 20


@dataclass(kw_only=True)
class Node:
    """A file (`data`, and what of it is `synced`) or a folder (`entries`, `durable` ones, and
    changes since)."""

    folder: bool
    data: bytes = b""
    synced: bytes = b""
    entries: dict[str, "Node"] = field(default_factory=dict)
    durable: dict[str, "Node"] = field(default_factory=dict)
    pending: list[dict[str, "Node | None"]] = field(default_factory=list)

    def change(self, entries: "dict[str, Node | None]") -> None:
        self.pending.append(entries)
        _apply(self.entries, entries)

    def sync(self) -> None:
        self.synced, self.durable = self.data, dict(self.entries)
        self.pending.clear()

    def possible(self, chance: random.Random) -> list[dict[str, "Node"]]:
        """Every set of entries that may be found: of a few pending changes all subsets, of many the
        telling ones."""
        count = len(self.pending)
        if count <= MOST_ENTRIES:
            subsets: list[Sequence[int]] = [
                s for n in range(count + 1) for s in itertools.combinations(range(count), n)
            ]
        else:
            subsets = [(), *(range(n) for n in range(1, count + 1))]
            subsets += [[i for i in range(count) if i != lost] for lost in range(count)]
            subsets += [
                sorted(chance.sample(range(count), chance.randrange(count))) for _ in range(8)
            ]
        found: list[dict[str, Node]] = []
        for subset in subsets:
            entries = dict(self.durable)
            for i in subset:
                _apply(entries, self.pending[i])
            if entries not in found:
                found.append(entries)
        return found

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def _apply(entries: dict[str, Node], change: Mapping[str, Node | None]) -> None:
    for name, node in change.items():
        if node is None:
            entries.pop(name, None)
        else:
            entries[name] = node


class Disk:
    """What the calls so far have left in memory and on the disk. Paths are relative to the folder
    that is watched."""

    def __init__(self) -> None:
        self.root = Node(folder=True)
        self.folders = [self.root]

    def apply(self, call: Call) -> None:
        parent, _, name = call.path.rpartition("/")
        match call.op:
            case "mkdir":
                self.folders.append(Node(folder=True))
                self._node(parent).change({name: self.folders[-1]})
            case "open":
                self._node(parent).change({name: Node(folder=False)})
            case "write":
                self._node(call.path).data += call.data
            case "fsync":
                self._node(call.path).sync()
            case "link":
                self._node(parent).change({name: self._node(call.source)})
            case "replace":
                self._node(parent).change(
                    {name: self._node(call.source), call.source.rpartition("/")[2]: None}
                )
            case "unlink" | "rmdir":
                self._node(parent).change({name: None})

    def _node(self, path: str) -> Node:
        node = self.root
        for part in path.split("/") if path not in ("", ".") else ():
            node = node.entries[part]
        return node

    def states(self, chance: random.Random) -> Iterator[State]:
        """What may be found if the power goes now."""
        unsure = [folder for folder in self.folders if folder.pending]
        options = [folder.possible(chance) for folder in unsure]
        for chosen in _product(options, chance):
            yield from self._contents(dict(zip(unsure, chosen, strict=True)), chance)

    def _contents(
        self,
        chosen: Mapping[Node, dict[str, Node]],
        chance: random.Random,
    ) -> Iterator[State]:
        found: dict[str, Node] = {}
        folders = [("", self.root)]
        while folders:
            prefix, folder = folders.pop()
            for name, node in chosen.get(folder, folder.durable).items():
                if node.folder:
                    folders.append((f"{prefix}{name}/", node))
                else:
                    found[prefix + name] = node
        paths = sorted(found)
        for data in _product([_bytes(path, found[path]) for path in paths], chance):
            yield dict(zip(paths, data, strict=True))


def _bytes(path: str, node: Node) -> list[bytes]:
    if node.data == node.synced:
        return [node.data]
    if path.rpartition("/")[2].startswith(TEMPORARY):
        return [node.data, b""]
    return list(
        dict.fromkeys(
            (node.data, node.synced, b"", bytes(len(node.data)), node.data[: len(node.data) // 2])
        )
    )


def _product(options: Sequence[Sequence[Any]], chance: random.Random) -> Iterator[tuple[Any, ...]]:
    """All combinations; of too many the first, the last, those that differ from the last in one,
    and a sample."""
    if math.prod(map(len, options)) <= MOST_STATES:
        yield from itertools.product(*options)
        return
    last = tuple(option[-1] for option in options)
    yield tuple(option[0] for option in options)
    yield last
    for i, option in enumerate(options):
        yield from ((*last[:i], value, *last[i + 1 :]) for value in option[:-1])
    for _ in range(MOST_STATES):
        yield tuple(chance.choice(option) for option in options)


@dataclass(kw_only=True)
class Trace:
    """Performs calls and tells the disk of them. `moment` is called after each call, and after each
    promise."""

    disk: Disk
    moment: Callable[[str], None]
    promised: set[str] = field(default_factory=set)
    calls: int = 0

    def __call__(self, call: Call, perform: Callable[..., Any]) -> Any:
        result = perform()
        self.disk.apply(call)
        self.calls += 1
        self.moment(call.op)
        return result

    def acknowledge(self, what: str) -> None:
        self.promised.add(what)
        self.moment("promise")


class Expectations:
    """What must hold of a state, given the store that an undisturbed run makes."""

    def __init__(self, final: Mapping[str, bytes], spec: TowerSpec) -> None:
        self.final = final
        self.objects: dict[str, list[str]] = {}
        self.present: dict[str, str] = {}
        table = json.loads(final["records/pairs.json"])["objects"]
        self._add("store", "records/pairs.json", ["records/source.json", "README.md", *table])
        for m in MODALITIES:
            folder = f"records/{m}/{NAME}"
            zarr = [f"features.zarr/{m}/{NAME}/{path}" for path in array_record(spec, m).metadata]
            self.objects[m] = [f"{folder}/fingerprint.json", *zarr]
            records = [
                f"{folder}/commits/{shard:08d}.json" for shard in range(spec.layout(m).n_shards)
            ]
            for shard, record in enumerate(records):
                self._add(
                    f"{m}/{shard}",
                    record,
                    [*json.loads(final[record])["objects"], *self.objects[m]],
                )
            self._add(f"{m}/seal", f"{folder}/seal.json", records)
        if spec.edited:
            self._add_edit(spec)

    def _add_edit(self, spec: TowerSpec) -> None:
        """Add what must hold of the block and of the views that an edit adds."""
        final = self.final
        segment = "records/segments/0001.json"
        table = json.loads(final[f"{BLOCK}/records/pairs.json"])["objects"]
        names = ["records/pairs.json", "records/source.json", "README.md", *table]
        self._add("block", segment, [f"{BLOCK}/{name}" for name in names])
        for m in MODALITIES:
            folder = f"{BLOCK}/records/{m}/{NAME}"
            metadata = array_record(spec, m, of_block=True).metadata
            zarr = [f"{BLOCK}/features.zarr/{m}/{NAME}/{path}" for path in metadata]
            self.objects[f"block/{m}"] = [f"{folder}/fingerprint.json", *zarr]
            records = []
            for shard in range(spec.block.layout(m).n_shards):
                records.append(f"{folder}/commits/{shard:08d}.json")
                objects = [f"{BLOCK}/{name}" for name in json.loads(final[records[-1]])["objects"]]
                self._add(
                    f"block/{m}/{shard}", records[-1], [*objects, *self.objects[f"block/{m}"]]
                )
            self._add(f"block/{m}/seal", f"{folder}/seal.json", records)
        seals = [f"{BLOCK}/records/{m}/{NAME}/seal.json" for m in MODALITIES]
        for record in (name for name in final if name.startswith("records/views/")):
            view = record.removeprefix("records/views/").removesuffix(".json")
            objects = list(json.loads(final[record])["objects"])
            # The copy of the record comes after it, but before the promise.
            self._add(f"recorded {view}", record, [*objects, segment, *seals])
            number = int(view.partition("-")[0])
            self.objects[f"view/{number}"] = [record, *objects, f"views/{view}/view.json"]

    def _add(self, name: str, record: str, objects: list[str]) -> None:
        self.objects[name] = [record, *objects]
        self.present[record] = name

    def violations(self, state: State, promised: set[str]) -> list[str]:
        """Promises broken, records present whose objects are not, and files that are not whole."""
        store = {
            path.partition("/")[2]: data
            for path, data in state.items()
            if path.startswith("store/")
        }
        wrong = []
        due = promised | {name for record, name in self.present.items() if record in store}
        for name in due:
            lost = [path for path in self.objects[name] if store.get(path) != self.final[path]]
            wrong += (
                [f"{name} is {'promised' if name in promised else 'recorded'} without {lost[0]}"]
                if lost
                else []
            )
        for path, data in store.items():
            if not path.rpartition("/")[2].startswith(TEMPORARY) and data != self.final.get(path):
                wrong.append(f"{path} is not whole")
        return wrong


@dataclass(kw_only=True)
class PowerResult:
    """`states` cuts were examined, `resumed` of them by a run that went on from there. `cuts` calls
    of the trace."""

    cuts: int = 0
    states: int = 0
    resumed: int = 0
    wrong: list[str] = field(default_factory=list)

    def examine(self, state: State, trace: Trace, expected: Expectations, after: str = "") -> None:
        self.states += 1
        self.wrong += [
            f"{after}cut after call {trace.calls}: {w}"
            for w in expected.violations(state, trace.promised)
        ]
        if len(self.wrong) > MOST_WRONG:
            raise EnoughError


MakeFiles = Callable[[Path], LocalFiles]


def expectations(folder: Path, spec: TowerSpec) -> Expectations:
    with cached_tables(), intercepted(folder, unsynced()):
        run(folder / "undisturbed", spec)
    return Expectations(tree(folder / "undisturbed"), spec)


class EnoughError(BaseException):
    """`MOST_WRONG` violations tell as much as thousands."""


def finds_violation(folder: Path, spec: TowerSpec, make: MakeFiles) -> bool:
    """Whether a store written like this breaks a promise in some state."""
    for name, cuts in (("remove", cut_removal), ("cut", cut_anywhere), ("kill", kill_then_cut)):
        (folder / name).mkdir(parents=True)
        if cuts(folder / name, spec, make).wrong:  # type: ignore[operator]
            return True
    return False


def cut_removal(folder: Path, spec: TowerSpec, make: MakeFiles = LocalFiles) -> PowerResult:
    """What was removed does not come back."""
    result = PowerResult()
    disk = Disk()
    chance = random.Random(0)
    trace = Trace(disk=disk, moment=lambda _: None)
    with intercepted(folder, unsynced(trace)):
        files = make(folder / "store")
        files.write("a/x", b"1")
        files.write("a/y", b"2")
        files.write("b/c/z", b"3")
        files.remove("a/x")
        files.remove_folder("b")
    for state in disk.states(chance):
        result.states += 1
        if state != {"store/a/y": b"2"}:
            result.wrong.append("what was removed is there again")
    return result


def cut_anywhere(
    folder: Path,
    spec: TowerSpec,
    make: MakeFiles = LocalFiles,
    resumes: int = 0,
    seed: int = 0,
) -> PowerResult:
    """One run, cut after every system call. Of the states found, `resumes` (-1: all) are finished
    by another run."""
    expected = expectations(folder, spec)
    result = PowerResult()
    chance = random.Random(seed)
    states: dict[int, tuple[State, set[str]]] = {}
    trace = Trace(disk=Disk(), moment=lambda _: None)

    def moment(op: str) -> None:
        result.cuts += op != "promise"
        for state in trace.disk.states(chance):
            result.examine(state, trace, expected)
            states.setdefault(hash(frozenset(state.items())), (state, set(trace.promised)))

    trace.moment = moment
    base = folder / "cut"
    base.mkdir()
    with suppress(EnoughError), cached_tables(), intercepted(base, unsynced(trace)):
        run(base / "store", spec=spec, files=make(base / "store"), acknowledge=trace.acknowledge)
    if not result.wrong:
        found = list(states.values())
        chosen = found if resumes < 0 else chance.sample(found, min(resumes, len(found)))
        for number, (state, promised) in enumerate(chosen):
            result.resumed += 1
            result.wrong += _resume(
                folder / f"state-{number}",
                state=state,
                promised=promised,
                spec=spec,
                expected=expected,
            )
    return result


def _resume(
    folder: Path,
    state: State,
    promised: set[str],
    spec: TowerSpec,
    expected: Expectations,
) -> list[str]:
    for path, data in state.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    store = folder / "store"
    wrong = check(store, spec, {}, begun=1)
    with cached_tables(), intercepted(folder, unsynced()):
        done = run(store, spec)
    wrong += [f"{shard} was promised and is done again" for shard in set(done) & promised]
    wrong += ["the next run ends with another store"] if tree(store) != expected.final else []
    shutil.rmtree(folder)
    return [f"{folder.name}: {what}" for what in wrong]


def kill_then_cut(
    folder: Path,
    spec: TowerSpec,
    make: MakeFiles = LocalFiles,
    everywhere: bool = False,
) -> PowerResult:
    """A run is killed at every call, another finishes it; the power goes whenever that one has
    promised something (`everywhere`: after every call of it). The last calls first, for there the
    least is done after the kill."""
    expected = expectations(folder, spec)
    result = PowerResult()
    chance = random.Random(0)
    for nth in range(_count(folder, spec), 0, -1):
        base = folder / f"kill-{nth}"
        base.mkdir()
        trace = Trace(disk=Disk(), moment=lambda _: None)
        with (
            suppress(SimulatedKill),
            cached_tables(),
            intercepted(base, Stop(nth=nth, then=unsynced(trace))),
        ):
            run(base / "store", spec, make(base / "store"))

        def moment(op: str, trace: Trace = trace, nth: int = nth) -> None:
            if everywhere or op == "promise":
                result.cuts += 1
                for state in trace.disk.states(chance):
                    result.examine(
                        state,
                        trace=trace,
                        expected=expected,
                        after=f"killed at call {nth}, ",
                    )

        trace.moment = moment
        result.resumed += 1
        try:
            with cached_tables(), intercepted(base, unsynced(trace)):
                run(
                    base / "store",
                    spec=spec,
                    files=make(base / "store"),
                    acknowledge=trace.acknowledge,
                )
        except EnoughError:
            break
        shutil.rmtree(base)
    return result


def _count(folder: Path, spec: TowerSpec) -> int:
    trace = Trace(disk=Disk(), moment=lambda _: None)
    with cached_tables(), intercepted(folder, unsynced(trace)):
        run(folder / "counted", spec)
    return trace.calls


# --- without one fsync ----------------------------------------------------------------------------


def sync_calls() -> list[str]:
    """Every call in apecache/storage/local_files.py that makes something durable, as `function, line`."""
    return [
        f"{function} in line {call.lineno}" for function, call in _sync_calls(ast.parse(_source()))
    ]


def without_sync(number: int) -> type[LocalFiles]:
    """LocalFiles with one of `sync_calls` left out."""
    module = ast.parse(_source())
    removed = _sync_calls(module)[number][1]
    for node in ast.walk(module):
        for name in ("body", "orelse", "finalbody", "handlers"):
            lines = getattr(node, name, None)
            if isinstance(lines, list):
                setattr(
                    node,
                    name,
                    [ast.copy_location(ast.Pass(), x) if x is removed else x for x in lines],
                )
    names: dict[str, Any] = {"__name__": "apecache.storage.local_files"}
    exec(compile(module, local_module.__file__, "exec"), names)
    changed: type[LocalFiles] = names["LocalFiles"]
    return changed


def _source() -> str:
    return inspect.getsource(local_module)


def _sync_calls(module: ast.Module) -> list[tuple[str, ast.Expr]]:
    functions = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef)]
    return [
        (function.name, line)
        for function in functions
        for line in ast.walk(function)
        if isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Call)
        and ast.unparse(line.value.func) in ("os.fsync", "self._sync_folder")
    ]
