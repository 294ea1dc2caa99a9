"""Options of the commands that a Ray cluster can run."""

import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from apecache.cluster.pool import RaySpec

Engine = Annotated[str, typer.Option(help="local, or ray: actors on a Ray cluster (needs ray).")]
Address = Annotated[
    str | None,
    typer.Option(
        help=(
            "Of the Ray cluster: HOST:PORT or auto. Default: RAY_ADDRESS, or else this machine "
            "alone."
        )
    ),
]
RayActors = Annotated[
    int | None,
    typer.Option(
        "--ray-actors",
        min=1,
        help="Actors. Default: as many as the nodes have room for.",
    ),
]
RayCpus = Annotated[
    int | None,
    typer.Option("--ray-cpus", min=1, help="CPUs of an actor, and its threads. Default: 1."),
]
RayGpus = Annotated[
    float | None,
    typer.Option(
        "--ray-gpus",
        min=0,
        help="GPUs of an actor. Default: 1 where the cluster has any.",
    ),
]


def results_only(cluster: "RaySpec | None") -> AbstractContextManager[object]:
    """Send what Ray prints of its actors to standard error: standard output is for results."""
    return redirect_stdout(sys.stderr) if cluster else nullcontext()


def ray_spec(
    engine: str,
    address: str | None,
    actors: int | None,
    cpus: int | None,
    gpus: float | None,
) -> "RaySpec | None":
    """Build the settings of a Ray cluster; None for the local engine.

    Raises:
        OptionError: An engine that does not exist, or options of Ray for the local engine.
    """
    from apecache.errors import OptionError

    from .terminal import choice

    choice("--engine", engine, ("local", "ray"))
    options = {"--address": address, "--ray-actors": actors, "--ray-cpus": cpus, "--ray-gpus": gpus}
    ray_options = [name for name, value in options.items() if value is not None]
    if engine == "local":
        if ray_options:
            raise OptionError(f"{', '.join(ray_options)}: only with --engine ray")
        return None
    from apecache.cluster.pool import RaySpec

    return RaySpec(address=address, actors=actors, cpus=1 if cpus is None else cpus, gpus=gpus)
