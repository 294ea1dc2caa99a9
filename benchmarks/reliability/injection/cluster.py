"""Kills on a Ray cluster of three simulated nodes: of actors, of a node, of the driver, at any
moment.

The actors run the tower, so that a restart costs no import of torch; pool, driver loop and commits
are the engine's. As a program it is the driver:
`python -m benchmarks.reliability.injection.cluster '{"address": …, "store": …}'`.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from apecache.cluster.pool import RaySpec, open_pool
from apecache.cluster.task_state import ShardReport, ShardRequest, Task, TaskState, fill
from apecache.storage.local_files import LocalFiles
from apecache.store.layout import commit_name
from apecache.store.writer import ArrayWriter
from benchmarks.reliability.injection.kill import check
from benchmarks.reliability.injection.program import ROOT, program_command, program_environment
from benchmarks.reliability.injection.tower import (
    MODALITIES,
    NAME,
    TowerSpec,
    array_record,
    commit_shard,
    run,
    tree,
)

NODES = 3
STORE_BYTES = 80 * 2**20
DRIVER_SECONDS = 180
QUICK_HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}


class TowerWorker:
    """An actor's worker; `pids` is a folder in which it leaves its process number."""

    def __init__(self, store: Path, spec: TowerSpec, pids: Path, seconds: float, cpus: int) -> None:
        self.store = store
        self.spec = spec
        self.seconds = seconds
        (pids / str(os.getpid())).touch()

    def do(self, piece: str | ShardRequest) -> list[Task] | ShardReport:
        if not isinstance(piece, ShardRequest):
            run(self.store, self.spec, shards={modality: [] for modality in MODALITIES})
            return [
                Task(folder=self.store, job=0, modality=modality, names=(NAME,))
                for modality in MODALITIES
            ]
        time.sleep(self.seconds)
        files = LocalFiles(piece.task.folder)
        modality = piece.task.modality
        if not files.exists(commit_name(modality, NAME, piece.shard)):
            commit_shard(
                ArrayWriter(files, array_record(self.spec, modality)),
                self.spec,
                piece.shard,
            )
        return ShardReport()


def drive(
    address: str,
    store: str,
    pids: str,
    spec: dict[str, Any],
    seconds: float,
    actors: int = NODES,
) -> None:
    """Fill a store as the engine does; prints what it did, one line for each shard."""
    make = partial(TowerWorker, Path(store), TowerSpec(**spec), Path(pids), seconds)
    with open_pool(make, RaySpec(address=address, actors=actors)) as pool:
        task_states = [TaskState(task) for task in pool.first("prepare")]
        fill(
            pool,
            task_states,
            lambda task_state, shard, *_: print(
                f"{task_state.task.modality}/{shard}",
                flush=True,
            ),
        )


class Nodes:
    """A cluster on this machine: a head, where the driver lives, and others that can be killed and
    replaced."""

    def __init__(self, python_path: Sequence[Path] = ()) -> None:
        """Start the cluster; its actors also import from the folders of `python_path`."""
        from apecache.cluster.pool import import_ray

        import_ray()
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, *python_path)))
        about: dict[str, Any] = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        head = {**about, "include_dashboard": False, "_system_config": QUICK_HEALTH}
        self.cluster = _started(head)
        self.about = about
        self.others = [self.cluster.add_node(**about) for _ in range(NODES - 1)]

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def kill_one(self, chance: random.Random) -> None:
        """SIGKILL one node's raylet; everything on the node ends with it. Another node takes its
        place."""
        node = self.others.pop(chance.randrange(len(self.others)))
        (raylet,) = node.all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)
        self.cluster.remove_node(node, allow_graceful=False)
        self.others.append(self.cluster.add_node(wait=False, **self.about))

    def close(self) -> None:
        self.cluster.shutdown()


def _started(head: dict[str, Any]) -> Any:
    """A cluster with its head. Ray gives a node half a minute to start, which a busy machine may
    not keep to."""
    from ray.cluster_utils import Cluster

    for _ in range(2):
        cluster = Cluster()
        with suppress(Exception):
            cluster.add_node(**head)
            return cluster
    return Cluster(initialize_head=True, head_node_args=head)


@contextmanager
def running_nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    try:
        yield nodes
    finally:
        nodes.close()


@dataclass(kw_only=True)
class ClusterResult:
    """`wrong` is what a promise forbids, one line each. `encoded` shards were reported to a
    driver."""

    kills: int = 0
    stores: int = 0
    encoded: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class _Run:
    """One store that is filled while something is killed."""

    nodes: Nodes
    folder: Path
    spec: TowerSpec
    chance: random.Random
    drivers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def driver(self) -> subprocess.Popen[str]:
        return self.drivers[-1]

    def start_driver(self) -> None:
        about = {
            "address": self.nodes.address,
            "store": str(self.store),
            "pids": str(self.folder / "pids"),
        }
        line = json.dumps({**about, "spec": asdict(self.spec), "seconds": 0.1})
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.drivers.append(
            subprocess.Popen(
                program_command("cluster", line),
                env=program_environment(),
                **pipes,
            )
        )

    def kill_actor(self) -> bool:
        """SIGKILL one of the processes that have left their number."""
        alive = [
            int(path.name) for path in (self.folder / "pids").iterdir() if _is_actor(int(path.name))
        ]
        if alive:
            os.kill(self.chance.choice(alive), signal.SIGKILL)
        return bool(alive)

    def kill_node(self) -> bool:
        self.nodes.kill_one(self.chance)
        return True

    def kill_driver(self) -> bool:
        self.driver.kill()
        self.start_driver()
        return True

    def wait_for_commits(self, count: int) -> bool:
        """Until so many shards are committed; False if the driver has ended before."""
        deadline = time.monotonic() + DRIVER_SECONDS
        while self.driver.poll() is None and time.monotonic() < deadline:
            if len(list(self.store.glob("records/*/*/commits/*.json"))) >= count:
                return True
            time.sleep(0.01)
        return False


def _is_actor(pid: int) -> bool:
    with suppress(OSError):
        return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


KINDS: dict[str, Callable[[_Run], bool]] = {
    "actor": _Run.kill_actor,
    "node": _Run.kill_node,
    "driver": _Run.kill_driver,
}


def cluster_kills(
    nodes: Nodes,
    folder: Path,
    spec: TowerSpec,
    kind: str,
    count: int,
    seed: int,
    each: int = 2,
) -> ClusterResult:
    """`count` kills of one kind, `each` on one store, at moments drawn from the shards that are
    committed by then."""
    chance = random.Random(seed)
    result = ClusterResult()
    run(folder / "reference", spec)
    wanted = tree(folder / "reference")
    while result.kills < count:
        place = folder / f"{kind}-{result.stores}"
        (place / "pids").mkdir(parents=True)
        one = _Run(nodes=nodes, folder=place, spec=spec, chance=chance)
        one.start_driver()
        for moment in sorted(chance.sample(range(spec.n_shards), min(each, count - result.kills))):
            if one.wait_for_commits(moment):
                time.sleep(chance.uniform(0, 0.1))
                result.kills += KINDS[kind](one)
        result.wrong += [f"store {result.stores}: {what}" for what in _finish(one, result, wanted)]
        result.stores += 1
        shutil.rmtree(place)
    return result


def _finish(one: _Run, result: ClusterResult, wanted: dict[str, bytes]) -> list[str]:
    """The driver ends well, with every shard there, the right rows in each, and the bytes of one
    undisturbed writer."""
    wrong = []
    for driver in one.drivers:
        try:
            told, error = driver.communicate(timeout=DRIVER_SECONDS)
        except subprocess.TimeoutExpired:
            driver.kill()
            told, error = driver.communicate()
            wrong.append(f"the driver did not end in {DRIVER_SECONDS} s")
        result.encoded += len(told.split())
        if driver.returncode not in (0, -signal.SIGKILL):
            wrong.append(f"the driver ended with {driver.returncode}: {error[-300:]}")
    wrong += check(one.store, one.spec, {}, begun=0)
    again = run(one.store, one.spec)
    wrong += [f"left undone: {again}"] if again else []
    wrong += ["the store differs from that of one writer"] if tree(one.store) != wanted else []
    return wrong


if __name__ == "__main__":
    from benchmarks.reliability.injection import (
        cluster,  # the name by which an actor imports the tower
    )

    cluster.drive(**json.loads(sys.argv[1]))
