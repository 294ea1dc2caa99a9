"""`apecache sweep`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .engine import ray_spec, results_only
from .option_groups import (
    ADVANCED,
    CompleteStore,
    Device,
    FitOptions,
    Json,
    OptionGroup,
    Ray,
    Track,
    View,
    takes_groups,
)
from .terminal import choice, ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.cluster.pool import RaySpec
    from apecache.sweeps.halving import SweepSpec
    from apecache.sweeps.run import SweepReport
    from apecache.sweeps.trials import Trial

TRIALS = "Trials"


@dataclass(frozen=True, kw_only=True)
class SearchOptions(OptionGroup):
    """Hold which points a sweep tries, and how long each of them trains."""

    trials: Annotated[int, typer.Option(min=1, help="Number of trials. A grid may have fewer.")] = (
        20
    )
    sampler: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="random, grid or tpe (extra: sweep).",
            rich_help_panel=TRIALS,
        ),
    ] = "random"
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Fits per trial, each with another seed. Trials are ranked by the mean.",
            rich_help_panel=TRIALS,
        ),
    ] = 1
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Successive halving: stop the worst two thirds of the trials early, repeatedly.",
            rich_help_panel=TRIALS,
        ),
    ] = False
    rungs: Annotated[
        int,
        typer.Option(
            min=2,
            help="Stages of --halving. With 3, the first stage has a ninth of the epochs.",
            rich_help_panel=TRIALS,
        ),
    ] = 3
    keep_going: Annotated[
        bool,
        typer.Option(
            "--keep-going",
            help="Continue with the other trials when one fails.",
            rich_help_panel=TRIALS,
        ),
    ] = False
    sampler_seed: Annotated[
        int, typer.Option(help="Seed of the sampler.", rich_help_panel=TRIALS)
    ] = 0
    population: Annotated[
        int,
        typer.Option(
            min=1,
            help="Largest number of heads that train together.",
            rich_help_panel=ADVANCED,
        ),
    ] = 16
    memory_gb: Annotated[
        float,
        typer.Option(
            min=0.01,
            metavar="GB",
            help="Memory for the heads that train together.",
            rich_help_panel=ADVANCED,
        ),
    ] = 2.0


@takes_groups
def sweep(
    store: CompleteStore,
    recipe: Annotated[
        list[str],
        typer.Option(
            metavar="RECIPE",
            help="Name of a recipe, or a TOML file. Repeat it to choose among several recipes.",
        ),
    ],
    space: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help='TOML file of ranges, e.g. "optimizer.lr" = {log = [1e-4, 1e-2]}.',
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder to create or to resume. The best run is OUT/best.",
        ),
    ],
    search: SearchOptions,
    fit: FitOptions,
    ray: Ray = None,
    track: Track = None,
    view: View = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Try many settings of one or more recipes and keep the best run.

    Heads of the same structure train together. Trials are compared on the dev split. Interrupt at
    any time; run the same command to resume.

    Example: apecache sweep store --recipe projection --space space.toml --trials 64 --out sweep
    --halving
    """
    with ending():
        choice("--sampler", search.sampler, ("random", "grid", "tpe"))
        cluster = ray_spec(ray)
        from apecache.sweeps.space import load_space

        # The space is checked before the store is opened and before a cluster is asked.
        loaded = load_space(space, recipe)
        from apecache.store.reader import FeatureStore

        spec = sweep_spec(search, fit, device)
        with results_only(cluster), trial_display(track, out) as show:
            report = run_on(cluster)(
                FeatureStore.open(store, view),
                space=loaded,
                out=out,
                spec=spec,
                progress=show,
            )
        show_sweep(report, json)


def sweep_spec(search: SearchOptions, fit: FitOptions, device: str) -> "SweepSpec":
    """Return the settings of a sweep."""
    from apecache.sweeps.halving import SweepSpec
    from apecache.train.head_data import FitSpec

    fit_spec = FitSpec(
        fit.image_features,
        text_features=fit.text_features,
        splits=fit.splits,
        seed=fit.seed,
        device=device,
        save_seconds=fit.save_seconds,
    )
    # `choice` has checked it; the type of the field is a Literal, which an option is not.
    sampler: Any = search.sampler
    return SweepSpec(
        search.trials,
        sampler=sampler,
        seeds=search.seeds,
        seed=search.sampler_seed,
        halving=search.halving,
        keep_going=search.keep_going,
        population=search.population,
        memory_bytes=int(search.memory_gb * 2**30),
        rungs=search.rungs,
        fit=fit_spec,
    )


def show_sweep(report: "SweepReport", json: bool) -> None:
    """Write the page; show all trials and the command that repeats the best one."""
    from apecache.report.sweep_page import sweep_page

    page = sweep_page(report.folder)
    if json:
        show_json({**asdict(report), "page": page})
        return
    rows: list[tuple[object, ...]] = []
    for trial in report.trials:
        settings = " ".join(trial.settings)
        score = _score(trial)
        rows.append((trial.number, trial.state, trial.epochs, *score, trial.recipe, settings))
    columns = (
        "trial",
        "state",
        "epochs",
        "dev mean recall",
        "95 %",
        "chance",
        "recipe",
        "settings",
    )
    show_table(f"{report.run}: best trial on dev: {report.best.number}", columns, rows)
    typer.echo(f"repeat the best trial: {report.command}")
    typer.echo(f"page with all trials: {page}")


def run_on(cluster: "RaySpec | None") -> "Callable[..., SweepReport]":
    """Return `sweep` for this machine, or for a Ray cluster."""
    if cluster is None:
        from apecache.sweeps.run import sweep

        return sweep
    # Only here: the cluster needs Ray, which is an extra.
    from apecache.cluster.sweep import sweep_on_ray

    return partial(sweep_on_ray, cluster=cluster)


@contextmanager
def trial_display(trackers: list[str] | None, out: Path) -> Iterator["Callable[[Trial], None]"]:
    """Show every trial on the terminal, and log it where it was asked for.

    Yields:
        A function to call with every trial that ends.
    """
    if not trackers:
        yield show_trial
        return
    from apecache.train.trackers import track_sweep

    with ExitStack() as stack:
        logs = [stack.enter_context(track_sweep(tracker, out.name)) for tracker in trackers]

        def show_and_log(trial: "Trial") -> None:
            show_trial(trial)
            # A failed trial has no figures to log.
            if trial.mean is not None:
                figures = {"dev/mean_recall": trial.mean, "epochs": float(trial.epochs)}
                for log in logs:
                    log(trial.number, figures)

        yield show_and_log


def show_trial(trial: "Trial") -> None:
    """Show a trial that ended on standard error, with chance beside its recall."""
    score = trial.error or f"dev mean recall {trial.mean:.1f}{_beside(trial)}"
    typer.echo(
        f"trial {trial.number:3d}  {trial.state}  {score}  {' '.join(trial.settings)}",
        err=True,
    )


def _beside(trial: "Trial") -> str:
    """Return chance in brackets; trials of older versions have none."""
    return "" if trial.chance is None else f" (chance {trial.chance:.1f})"


def _score(trial: "Trial") -> tuple[str, str, str]:
    """Return the mean on dev, its interval and chance; empty for what a trial does not have."""
    mean = "" if trial.mean is None else f"{trial.mean:.1f}"
    span = "" if trial.low is None else f"{trial.low:.1f} to {trial.high:.1f}"
    chance = "" if trial.chance is None else f"{trial.chance:.1f}"
    return mean, span, chance
