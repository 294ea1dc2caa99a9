"""Run a pool of Ray actors: a piece of work goes to any free actor; a lost piece is done again.

Ray places actors, restarts them when their process or node dies, and waits for nodes that come
back. The pool itself keeps which piece each actor has. A piece that was lost goes to the next free
actor, not to the one that lost it, as that one may never find a node again. This is why the pool
uses actors and `ray.wait`, not Ray Data: there a lost piece waits for its actor, and pieces and
results become Arrow tables, which helps nothing, as features never leave an actor. An actor has one
piece at a time, so no queue grows. A piece must be safe to do twice.

Pieces, results and the worker travel in Ray's own format, which is pickle: whoever can reach a
cluster's ports can run code on it, with apecache or without. Nothing is unpickled from a file.
apecache's own errors travel as text, and are raised as the same errors by the driver. Every node
needs apecache in its environment, at the same version as the driver.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

from apecache import errors
from apecache.arguments import require_spec
from apecache.errors import (
    ApecacheError,
    EngineError,
    MissingExtraError,
    OptionError,
    counted,
    one_line,
)

MINIMUM = (2, 40)
"""Oldest version of Ray."""
CONNECT_SECONDS = 10.0
SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
"""Environment for Ray: it sends no usage statistics, and an actor without GPUs sees none."""


@dataclass(frozen=True, kw_only=True)
class RaySpec:
    """Choose a Ray cluster and its actors."""

    address: str | None = None
    """HOST:PORT of a cluster, or `auto` for the one that this machine belongs to; None: that of
    RAY_ADDRESS, or else a cluster of this machine alone that ends with the work."""
    actors: int | None = None
    """None: as many as fit."""
    cpus: int = 1
    """Of each actor; new arrays are computed with as many threads."""
    gpus: float | None = None
    """Of each actor; None: one where the cluster has any."""
    losses: int = 10
    """How often one piece may be lost with its actor before the piece is taken for the cause."""

    def for_device(self, device: str) -> "RaySpec":
        """Return the same without GPUs, unless they are given, if the actors use the CPU."""
        return replace(self, gpus=0.0) if device == "cpu" and self.gpus is None else self


class ActorWorker(Protocol):
    """Do pieces of work in an actor, with what is loaded once."""

    def do(self, piece: Any) -> Any:
        """Do one piece of work. It may be done twice, also at the same time.

        Raises:
            ApecacheError: to end the work of all actors.
        """


Make = Callable[[int], ActorWorker]
"""Called in each actor with its number of CPUs."""


@dataclass(frozen=True, kw_only=True)
class _RemoteError:
    """Carry one of apecache's errors from an actor to the driver."""

    error_name: str
    message: str
    differences: tuple[tuple[str, object, object], ...]
    """Those of a MismatchError; empty for other errors."""

    @staticmethod
    def of(error: ApecacheError) -> "_RemoteError":
        """Take an error apart."""
        return _RemoteError(
            error_name=type(error).__name__,
            message=str(error),
            differences=getattr(error, "differences", ()),
        )

    def error(self) -> ApecacheError:
        """Make the same error again."""
        error_class: type[ApecacheError] = getattr(errors, self.error_name, ApecacheError)
        # Without the constructors, whose arguments differ from class to class.
        error = error_class.__new__(error_class)
        Exception.__init__(error, self.message)
        if self.differences:
            error.differences = self.differences  # type: ignore[attr-defined]
        return error


class _LostError(Exception):
    """Say in Ray's words what happened to an actor and its piece."""


class _ActorRestarted:
    """Answer for an actor that died while it was idle, and came back without its worker."""


class _Actor:
    """Run a worker in a process on a node.

    A method makes the worker, not the constructor: if a constructor raises, Ray only reports a dead
    actor, and the constructor's arguments may be lost when the actor is restarted.
    """

    def __init__(self, folder: str) -> None:
        self.worker: ActorWorker | None = None
        with suppress(OSError):
            os.chdir(folder)  # relative paths mean what they mean to the driver

    def begin(self, make: Make, cpus: int) -> _RemoteError | None:
        """Make the worker, unless an earlier call has made it."""
        try:
            self.worker = self.worker or make(cpus)
        except ApecacheError as error:
            return _RemoteError.of(error)
        return None

    def do(self, piece: Any) -> Any:
        if self.worker is None:
            return _ActorRestarted()
        try:
            return self.worker.do(piece)
        except ApecacheError as error:
            return _RemoteError.of(error)


class ActorPool:
    """Keep actors that are loading, free or at work. Made by `open_pool`."""

    def __init__(self, ray: ModuleType, make: Make, spec: RaySpec) -> None:
        self.ray = ray
        self.spec = spec
        gpus = _gpus(ray, spec)
        self.losses: Counter[Any] = Counter()
        # By the reference of the call that is running: actors, and actors with their pieces.
        self.loading = dict[Any, Any]()
        self.working = dict[Any, tuple[Any, Any]]()
        self.free: deque[Any] = deque()
        count = spec.actors if spec.actors is not None else _how_many_fit(ray, spec.cpus, gpus)
        options = {"num_cpus": spec.cpus, "num_gpus": gpus, "scheduling_strategy": "SPREAD"}
        # Ray restarts actors without end, but repeats no piece: the pool decides who does it again.
        actor_class = ray.remote(_Actor).options(max_restarts=-1, max_task_retries=0, **options)
        # Put once, not sent anew with every call of `begin`.
        self.make = ray.put(make)
        self.actors = [actor_class.remote(os.getcwd()) for _ in range(count)]
        for actor in self.actors:
            self._load(actor)

    def first(self, piece: Any) -> Any:
        """Return the result of one piece, done by the first actor that is ready.

        Errors are those of `run`.
        """
        _, result = next(iter(self.run([piece])))
        return result

    def run(self, pieces: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        """Yield each piece with its result, in the order in which they are done.

        Args:
            pieces: hashable.

        Raises:
            EngineError: a piece was lost too often, or an actor cannot be started.

        Errors of the worker and of its maker are raised too.
        """
        waiting = deque(pieces)
        while waiting or self.working:
            while waiting and self.free:
                actor = self.free.popleft()
                piece = waiting.popleft()
                call = actor.do.remote(piece)
                self.working[call] = (actor, piece)
            finished, _ = self.ray.wait([*self.working, *self.loading], num_returns=1)
            (ref,) = finished
            if ref in self.loading:
                self._admit(ref)
                continue
            actor, piece = self.working.pop(ref)
            # Free at once: the pool stays usable if the result is an error, or the caller stops.
            self.free.append(actor)
            try:
                result = self._get(ref)
            except _LostError as lost:
                self._count_loss(piece, lost)
                # Next in turn, so that a piece that ends its actors is found early.
                waiting.appendleft(piece)
                # The last one in `free` is the lost actor, whose worker must be made again.
                self._load(self.free.pop())
            else:
                yield piece, result

    def close(self) -> None:
        """Stop all actors, also those at work."""
        for actor in self.actors:
            self.ray.kill(actor, no_restart=True)

    def _load(self, actor: Any) -> None:
        """Have an actor make its worker."""
        # Retried without end: Ray keeps this call until the actor has come up.
        begin = actor.begin.options(max_task_retries=-1)
        call = begin.remote(self.make, self.spec.cpus)
        self.loading[call] = actor

    def _admit(self, ref: Any) -> None:
        """Take an actor that has made its worker among the free ones."""
        actor = self.loading.pop(ref)
        try:
            self._get(ref)
        except _LostError as lost:
            raise EngineError(f"an actor cannot be started on the Ray cluster: {lost}") from None
        self.free.append(actor)

    def _get(self, ref: Any) -> Any:
        """Return a result, or raise what the worker raised.

        Raises:
            _LostError: the result was lost with its actor.
        """
        try:
            result = self.ray.get(ref)
        # A RayError too, but of a live actor: the worker raised an error that is not apecache's.
        except self.ray.exceptions.RayTaskError:
            raise
        except self.ray.exceptions.RayError as error:
            raise _LostError(one_line(error)) from None
        match result:
            case _ActorRestarted():
                raise _LostError("the actor was restarted")
            case _RemoteError():
                raise result.error()
        return result

    def _count_loss(self, piece: Any, lost: _LostError) -> None:
        self.losses[piece] += 1
        if self.losses[piece] > self.spec.losses:
            raise EngineError(
                f"{piece} was lost with its Ray actor {counted(self.losses[piece], 'time')}, the "
                f"last time with: {lost}; look for "
                "what ends processes on the nodes (memory?), then run the same command again"
            ) from None


@contextmanager
def open_pool(make: Make, spec: RaySpec) -> Iterator[ActorPool]:
    """Start actors on the cluster of `spec`, and stop them at the end, also after an error.

    Args:
        make: makes the worker of an actor from its number of CPUs.

    Raises:
        MissingExtraError: Ray is not installed.
        EngineError: Ray is too old, no cluster answers, or no node has room for one actor.
        OptionError: settings that make no sense.
    """
    _require_sense(spec)
    with _connected(spec) as ray:
        pool = ActorPool(ray, make, spec)
        try:
            yield pool
        finally:
            pool.close()


def _require_sense(spec: RaySpec) -> None:
    require_spec(spec, RaySpec, "cluster")
    no_actors = spec.actors is not None and spec.actors < 1
    negative_gpus = spec.gpus is not None and spec.gpus < 0
    if spec.cpus < 1 or no_actors or negative_gpus:
        raise OptionError(
            "a Ray actor needs at least one CPU, and there must be at least one actor"
        )
    if spec.address and spec.address.startswith("ray://"):
        raise OptionError(
            f"{spec.address} is an address of Ray's client; run on a node of the cluster, with auto"
        )


def import_ray() -> ModuleType:
    """Import the module `ray`, with its settings in the environment.

    Raises:
        MissingExtraError: it is not installed.
        EngineError: it is too old.
    """
    # Set before the import, and only where the user has set nothing.
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise MissingExtraError("ray", "ray") from None
    major_and_minor = ray.__version__.split(".")[:2]
    if tuple(int(number) for number in major_and_minor) < MINIMUM:
        minimum = ".".join(map(str, MINIMUM))
        raise EngineError(
            f"ray {ray.__version__} is too old: {minimum} is needed; pip install 'apecache[ray]'"
        )
    return ray


@contextmanager
def _connected(spec: RaySpec) -> Iterator[Any]:
    """Connect to a cluster, and disconnect at the end unless the caller was connected already."""
    ray = import_ray()
    if ray.is_initialized():
        yield ray
        return
    address = spec.address or os.environ.get("RAY_ADDRESS") or "local"
    # A cluster that is started here ends with the work: nobody looks at its dashboard.
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        _require_answer(address)
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises a plain one where its processes do not start in time
        raise EngineError(
            f"no Ray cluster at {address}: {one_line(error)}; ray start --head begins one"
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Check that something listens at an address HOST:PORT.

    Raises:
        OSError: nothing does.
    """
    # Ray itself would try for minutes.
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        connection = socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS)
        connection.close()


def _gpus(ray: ModuleType, spec: RaySpec) -> float:
    if spec.gpus is not None:
        return spec.gpus
    return 1.0 if ray.cluster_resources().get("GPU", 0) else 0.0


def _how_many_fit(ray: ModuleType, cpus: int, gpus: float) -> int:
    """Count the actors that the nodes have room for when nothing else runs there."""
    needed: dict[str, float] = {"CPU": cpus}
    if gpus:
        needed["GPU"] = gpus
    count = 0
    for node in ray.nodes():
        # Node by node: two halves of a CPU on two nodes make no actor.
        if node["Alive"]:
            resources = node["Resources"]
            count += int(min(resources.get(name, 0) // amount for name, amount in needed.items()))
    if not count:
        needs = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if gpus else "")
        raise EngineError(
            f"no node of the Ray cluster has {needs} for one actor; ask for less, or say how "
            "many actors"
        )
    return count


def node_name() -> str:
    """Return the name of this node, for messages."""
    return socket.gethostname()
