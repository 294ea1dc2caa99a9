"""`--ray`: run a command on a Ray cluster."""

import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apecache.cluster.pool import RaySpec

RAY_EXAMPLE = "auto,actors=4,cpus=2,gpus=1"


def results_only(cluster: "RaySpec | None") -> AbstractContextManager[object]:
    """Send what Ray prints about its actors to standard error: standard output is for results."""
    return redirect_stdout(sys.stderr) if cluster else nullcontext()


def ray_spec(text: str | None) -> "RaySpec | None":
    """Parse the value of `--ray`: an address, then resources such as `actors=4`.

    Returns:
        The settings of the cluster; None for no cluster.

    Raises:
        OptionError: The address is missing, or a resource is unknown, repeated or no number.
    """
    if text is None:
        return None
    from apecache.cluster.pool import RaySpec

    address, *entries = [entry.strip() for entry in text.split(",")]
    resources: dict[str, float] = {}
    for entry in entries:
        name, _, value = entry.partition("=")
        number = _resource(name, value)
        if number is None or name in resources:
            raise _refusal(text, entry)
        resources[name] = number
    if not address or "=" in address:
        raise _refusal(text, address)
    actors = resources.get("actors")
    return RaySpec(
        address=address,
        actors=None if actors is None else int(actors),
        cpus=int(resources.get("cpus", 1)),
        gpus=resources.get("gpus"),
    )


def _resource(name: str, value: str) -> float | None:
    """Return the number of a resource; None for one that Ray's actors cannot have."""
    try:
        number = float(value)
    except ValueError:
        return None
    match name:
        case "actors" | "cpus":
            return number if number >= 1 and number.is_integer() else None
        case "gpus":
            return number if 0 <= number < float("inf") else None
        case _:
            return None


def _refusal(text: str, entry: str) -> Exception:
    from apecache.errors import OptionError

    return OptionError(
        f"--ray {text}: expected an address, then actors, cpus or gpus, like {RAY_EXAMPLE}; found "
        f"{entry!r}"
    )
