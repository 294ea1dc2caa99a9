"""A pool of Ray actors: pieces of work go to whoever is free, and what dies with an actor or a node
is done again.

Ray places actors, restarts them when their process or node dies, and waits for nodes that come
back. Which piece an actor has is kept here: a piece that was lost goes to the next free actor, not
to the one that lost it, for that one may never find a place again. This is why the pool stands on
actors and `ray.wait`, and not on Ray Data: there a lost piece waits for its own actor, pieces and
results become Arrow tables, and the features that it would carry so well never leave an actor. An
actor has one piece at a time, so nothing piles up. A piece must be safe to do twice.

Pieces, results and the worker travel in Ray's own format, which is pickle: whoever can reach a
cluster's ports can run code on it, with apecache or without. Nothing is unpickled from a file.
Errors of ours travel as text, and are the same errors at the other end. Every node needs apecache
in its environment, at the same version as the driver.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

from apecache import errors
from apecache.errors import ApecacheError, EngineError, MissingExtraError, OptionError, one_line

MINIMUM = (2, 40)
CONNECT_SECONDS = 10.0
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""No usage statistics; and an actor without GPUs sees none."""


@dataclass(frozen=True, kw_only=True)
class RaySpec:
    """`address`: HOST:PORT of a cluster, or `auto` for the one that this machine belongs to; None:
    RAY_ADDRESS, or else a cluster of this machine alone that ends with the work. `actors`: None for
    as many as fit. `cpus`, `gpus`: of each actor; None: one GPU where the cluster has any. `cpus`
    is also how many threads a new array is computed with. `losses`: so often one piece may be lost
    with its actor before it is taken for the cause."""

    address: str | None = None
    actors: int | None = None
    cpus: int = 1
    gpus: float | None = None
    losses: int = 10

    def for_device(self, device: str) -> "RaySpec":
        """Without GPUs for actors that are told to use the CPU."""
        return replace(self, gpus=0.0) if device == "cpu" and self.gpus is None else self


class Worker(Protocol):
    """What an actor keeps loaded."""

    def do(self, piece: Any) -> Any:
        """One piece of work; may be done twice, also at the same time. Raises ApecacheError to end
        all of it."""


Make = Callable[[int], Worker]
"""Called in each actor with its number of CPUs."""


@dataclass(frozen=True, kw_only=True)
class _Refused:
    """An error of ours on its way to the driver."""

    kind: str
    message: str
    differences: tuple[tuple[str, object, object], ...]

    @staticmethod
    def of(error: ApecacheError) -> "_Refused":
        return _Refused(
            kind=type(error).__name__,
            message=str(error),
            differences=getattr(error, "differences", ()),
        )

    def error(self) -> ApecacheError:
        kind: type[ApecacheError] = getattr(errors, self.kind, ApecacheError)
        error = kind.__new__(kind)
        Exception.__init__(error, self.message)
        if self.differences:
            error.differences = self.differences  # type: ignore[attr-defined]
        return error


class _LostError(Exception):
    """What became of an actor, in Ray's words."""


class _Restarted:
    """The answer of an actor that has died while it was idle, and come back without its worker."""


class _Actor:
    """The process on a node. The worker is made by a method: what a constructor raises, Ray turns
    into a dead actor, and what it was given may be lost when the actor is restarted."""

    def __init__(self, folder: str) -> None:
        self.worker: Worker | None = None
        with suppress(OSError):
            os.chdir(folder)  # relative paths mean what they mean to the driver

    def begin(self, make: Make, cpus: int) -> _Refused | None:
        try:
            self.worker = self.worker or make(cpus)
        except ApecacheError as error:
            return _Refused.of(error)
        return None

    def do(self, piece: Any) -> Any:
        if self.worker is None:
            return _Restarted()
        try:
            return self.worker.do(piece)
        except ApecacheError as error:
            return _Refused.of(error)


class Pool:
    """Actors that are loading, free, or at work. See `open_pool`."""

    def __init__(self, ray: Any, make: Make, spec: RaySpec) -> None:
        self.ray = ray
        self.spec = spec
        gpus = _gpus(ray, spec)
        self.losses: Counter[Any] = Counter()
        self.loading = dict[Any, Any]()
        self.working = dict[Any, tuple[Any, Any]]()
        self.free: deque[Any] = deque()
        count = spec.actors if spec.actors is not None else _how_many_fit(ray, spec.cpus, gpus)
        options = {"num_cpus": spec.cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        kind = ray.remote(_Actor).options(max_restarts=-1, max_task_retries=0, **options)
        self.make = ray.put(make)
        self.actors = [kind.remote(os.getcwd()) for _ in range(count)]
        for actor in self.actors:
            self._load(actor)

    def first(self, piece: Any) -> Any:
        """The result of one piece, done by whoever is ready first. Raises as `run` does."""
        return next(iter(self.run([piece])))[1]

    def run(self, pieces: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Each piece with its result, in the order in which they are done; pieces are hashable.

        Raises:
            EngineError: a piece was lost too often, or an actor cannot be started. What the worker
                and its maker raise.
        """
        waiting = deque(pieces)
        while waiting or self.working:
            while waiting and self.free:
                actor = self.free.popleft()
                piece = waiting.popleft()
                self.working[actor.do.remote(piece)] = actor, piece
            ((ref,), _) = self.ray.wait([*self.working, *self.loading], num_returns=1)
            if ref in self.loading:
                self._admit(ref)
                continue
            actor, piece = self.working.pop(ref)
            self.free.append(actor)
            try:
                result = self._get(ref)
            except _LostError as lost:
                self._count_loss(piece, lost)
                waiting.appendleft(piece)
                self._load(self.free.pop())
            else:
                yield piece, result

    def close(self) -> None:
        for actor in self.actors:
            self.ray.kill(actor, no_restart=True)

    def _load(self, actor: Any) -> None:
        """Ray keeps this call until the actor lives, however often it must be restarted."""
        self.loading[actor.begin.options(max_task_retries=-1).remote(self.make, self.spec.cpus)] = (
            actor
        )

    def _admit(self, ref: Any) -> None:
        """An actor has its worker, and may have work."""
        actor = self.loading.pop(ref)
        try:
            self._get(ref)
        except _LostError as lost:
            raise EngineError(f"an actor cannot be started on the Ray cluster: {lost}") from None
        self.free.append(actor)

    def _get(self, ref: Any) -> Any:
        """A result. Raises _LostError if it went down with its actor, and what the worker
        raised."""
        try:
            result = self.ray.get(ref)
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as error:
            raise _LostError(one_line(error)) from None
        match result:
            case _Restarted():
                raise _LostError("the actor was restarted")
            case _Refused():
                raise result.error()
        return result

    def _count_loss(self, piece: Any, lost: _LostError) -> None:
        self.losses[piece] += 1
        if self.losses[piece] > self.spec.losses:
            raise EngineError(
                f"{piece} was lost with its Ray actor {self.losses[piece]} times, the last time "
                f"with: {lost}; look for "
                "what ends processes on the nodes (memory?), then run the same command again"
            ) from None


@contextmanager
def open_pool(make: Make, spec: RaySpec) -> Iterator[Pool]:
    """Actors on the cluster of `spec`, stopped at the end however it comes.

    Raises:
        MissingExtraError, EngineError: Ray is not there, too old, or no cluster answers, or no node
            has room for one
        actor. OptionError: settings that make no sense.
    """
    _require_sense(spec)
    with _connected(spec) as ray:
        pool = Pool(ray, make, spec)
        try:
            yield pool
        finally:
            pool.close()


def _require_sense(spec: RaySpec) -> None:
    if (
        spec.cpus < 1
        or (spec.actors is not None and spec.actors < 1)
        or (spec.gpus is not None and spec.gpus < 0)
    ):
        raise OptionError(
            "a Ray actor needs at least one CPU, and there must be at least one actor"
        )
    if spec.address and spec.address.startswith("ray://"):
        raise OptionError(
            f"{spec.address} is an address of Ray's client; run on a node of the cluster, with auto"
        )


def import_ray() -> Any:
    """The module `ray`. Raises MissingExtraError if it is not installed, EngineError if it is too
    old."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    if tuple(int(part) for part in ray.__version__.split(".")[:2]) < MINIMUM:
        wanted = ".".join(map(str, MINIMUM))
        raise EngineError(
            f"ray {ray.__version__} is too old: {wanted} is needed; pip install 'apecache[ray]'"
        )
    return ray


@contextmanager
def _connected(spec: RaySpec) -> Iterator[Any]:
    """Ray, connected; a connection that the caller had made stays."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = spec.address or os.environ.get("RAY_ADDRESS") or "local"
    own: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _require_answer(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:  # Ray raises a plain one where its processes do not start in time
        raise EngineError(
            f"no Ray cluster at {address}: {one_line(error)}; ray start --head begins one"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Ray itself asks an address of which nobody answers for minutes. Raises OSError."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _gpus(ray: Any, spec: RaySpec) -> float:
    if spec.gpus is not None:
        return spec.gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _how_many_fit(ray: Any, cpus: int, gpus: float) -> int:
    """Actors that the nodes have room for when nothing else runs there."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
    count = sum(
        int(min(node.get(what, 0) // much for what, much in wanted.items())) for node in alive
    )
    if not count:
        needs = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise EngineError(
            f"no node of the Ray cluster has {needs} for one actor; ask for less, or say how "
            "many actors"
        )
    return count


def node_name() -> str:
    """Of this node, for messages."""
    return socket.gethostname()
