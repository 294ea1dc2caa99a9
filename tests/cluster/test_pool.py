"""The pool of actors: every piece is done, errors of ours come back as they are, and nothing is
left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from pieces import Pieces, refusing

import apecache.cluster.pool as engine
from apecache.cluster.pool import ActorPool, RaySpec, import_ray, open_pool
from apecache.errors import (
    BadRowsError,
    EncoderError,
    EngineError,
    MismatchError,
    MissingExtraError,
    OptionError,
)

if TYPE_CHECKING:
    from benchmarks.reliability.injection.cluster import Nodes

SUPPORT = str(Path(__file__).parents[1] / "support")


@pytest.fixture
def pool(nodes: "Nodes", tmp_path: Path) -> Iterator[ActorPool]:
    with open_pool(
        partial(Pieces, tmp_path),
        RaySpec(address=nodes.address, actors=2, losses=1),
    ) as running:
        yield running


def alive(log: Path) -> list[str]:
    """Numbers of actors' processes that still run."""
    found = []
    for path in log.glob("*-*"):
        pid = path.name.split("-")[0]
        try:
            if b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
        except OSError:
            continue
    return found


def gone(log: Path, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while alive(log) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive(log)


def test_every_piece_is_done_once_and_lost_ones_again(pool: ActorPool, tmp_path: Path) -> None:
    """One test for what needs living actors: it is their start that takes time."""
    pieces = [f"sleep 0.0{i}" for i in range(7)]
    assert sorted(pool.run(pieces)) == [(piece, f"done {piece}") for piece in pieces]
    assert pool.first("x") == "done x"
    assert not pool.working

    idle = alive(tmp_path)
    assert idle
    for pid in idle:
        os.kill(int(pid), signal.SIGKILL)
    assert sorted(pool.run(pieces[:3])) == [(piece, f"done {piece}") for piece in pieces[:3]]

    died = f"die {tmp_path / 'here'}"
    assert sorted(pool.run([died, "y"])) == [(died, f"done {died}"), ("y", "done y")]

    with pytest.raises(MismatchError, match=r"^another one$") as mismatch:
        pool.first("raise mismatch")
    assert mismatch.value.differences == (("encoder.weights", "a", "b"),)
    with pytest.raises(BadRowsError, match=r"^2 of 3 rows$"):
        pool.first("raise rows")
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[cpu\]'"):
        pool.first("raise extra")
    with pytest.raises(KeyError, match="a bug of ours"):
        pool.first("raise bug")
    with pytest.raises(
        EngineError,
        match=r"^always-die was lost with its Ray actor 2 times, the last time with: ",
    ):
        pool.first("always-die")
    assert {path.name.split("-")[1] for path in tmp_path.glob("*-*")} == {"1"}
    pool.close()
    assert gone(tmp_path)


def test_what_a_worker_is_made_of_may_be_refused(nodes: "Nodes") -> None:
    with (
        pytest.raises(EncoderError, match=r"^no such encoder: x$"),
        open_pool(refusing, RaySpec(address=nodes.address, actors=1)) as pool,
    ):
        pool.first("x")


def test_more_than_any_node_has_is_refused(nodes: "Nodes", tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match="no node of the Ray cluster has 64 CPUs for one actor"),
        open_pool(partial(Pieces, tmp_path), RaySpec(address=nodes.address, cpus=64)),
    ):
        pass


def test_an_interrupt_stops_the_actors(nodes: "Nodes", tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {SUPPORT!r})
from functools import partial
from pathlib import Path
from pieces import Pieces
from apecache.cluster.pool import RaySpec, open_pool
with open_pool(partial(Pieces, Path({str(tmp_path)!r})), RaySpec(address={nodes.address!r}, actors=1)) as pool:
    for piece, _ in pool.run(["x", "sleep 60"]):
        print(piece, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": SUPPORT}
    driver = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )  # fmt: skip
    assert driver.stdout
    assert driver.stdout.readline() == "x\n"
    time.sleep(0.2)
    driver.send_signal(signal.SIGINT)
    _, told = driver.communicate(timeout=30)
    assert "KeyboardInterrupt" in told
    assert gone(tmp_path)


# Without a cluster


def test_an_actor_that_came_back_without_its_worker_has_lost_its_piece() -> None:
    actor = engine._Actor(".")
    pool = object.__new__(ActorPool)
    pool.ray = SimpleNamespace(
        get=lambda ref: ref,
        exceptions=SimpleNamespace(RayTaskError=(), RayError=()),
    )
    with pytest.raises(engine._LostError, match="was restarted"):
        pool._get(actor.do("x"))


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (RaySpec(cpus=0), "at least one CPU"),
        (RaySpec(actors=0), "at least one actor"),
        (RaySpec(gpus=-1), "at least one"),
        (
            RaySpec(address="ray://head:10001"),
            "address of Ray's client; run on a node of the cluster",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec: RaySpec, said: str) -> None:
    with pytest.raises(OptionError, match=said), open_pool(refusing, spec):
        pass


def test_without_ray_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'apecache\[ray\]'"):
        import_ray()


@pytest.mark.parametrize(
    ("version", "refused"),
    [("2.39.9", True), ("2.40.0", False), ("3.0.0.dev0", False)],
)
def test_an_old_ray_is_refused_by_its_version(
    version: str,
    refused: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__=version))
    if refused:
        with pytest.raises(EngineError, match=r"ray 2\.39\.9 is too old: 2\.40 is needed"):
            import_ray()
    else:
        assert import_ray().__version__ == version


def test_no_usage_statistics_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(__version__="2.60.0"))
    import_ray()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "count"),
    [
        ([{"CPU": 8.0}, {"CPU": 3.0}], 2, 0, 5),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 64.0}], 2, 1, 2),
        ([{"CPU": 2.0, "GPU": 8.0}], 1, 0.5, 2),
        ([{"memory": 1e9}, {"CPU": 1.0}], 1, 0, 1),
    ],
)
def test_as_many_actors_as_each_node_has_room_for(
    nodes: list[dict[str, float]],
    cpus: int,
    gpus: float,
    count: int,
) -> None:
    dead = {"Alive": False, "Resources": {"CPU": 100.0, "GPU": 100.0}}
    ray = SimpleNamespace(
        nodes=lambda: [*({"Alive": True, "Resources": node} for node in nodes), dead]
    )
    assert engine._how_many_fit(ray, cpus, gpus) == count


@pytest.mark.parametrize(
    ("resources", "told", "count"),
    [({"GPU": 2.0}, None, 1), ({}, None, 0), ({"GPU": 2.0}, 0, 0)],
)
def test_an_actor_takes_a_gpu_where_there_are_any(
    resources: dict[str, float],
    told: float | None,
    count: float,
) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: resources)
    assert engine._gpus(ray, RaySpec(gpus=told)) == count


def test_actors_that_are_told_to_use_the_cpu_take_no_gpu() -> None:
    assert RaySpec().for_device("cpu").gpus == 0
    assert RaySpec().for_device("auto").gpus is None
    assert RaySpec(gpus=0.5).for_device("cpu").gpus == 0.5


def test_an_address_where_nobody_answers_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine, "import_ray", lambda: SimpleNamespace(is_initialized=lambda: False))
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    with (
        pytest.raises(EngineError, match=rf"^no Ray cluster at {address}: .*refused"),
        open_pool(refusing, RaySpec(address=address)),
    ):
        pass


def test_no_cluster_at_an_address_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(address: str, **_: Any) -> None:
        raise ConnectionError(f"could not find any\nrunning Ray instance at {address}")

    ray = SimpleNamespace(is_initialized=lambda: False, init=init)
    monkeypatch.setattr(engine, "import_ray", lambda: ray)
    with (
        pytest.raises(
            EngineError,
            match=r"^no Ray cluster at auto: could not find any running Ray instance at auto; ",
        ),
        open_pool(refusing, RaySpec(address="auto")),
    ):
        pass
