"""`apecache sweep`."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .engine import Address, Engine, RayActors, RayCpus, RayGpus, ray_spec, results_only
from .terminal import Device, Json, choice, ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.cluster.pool import RaySpec
    from apecache.sweeps.trials import Trial


def sweep(
    store: Annotated[str, typer.Argument(help="A complete feature store.")],
    recipe: Annotated[
        list[str],
        typer.Option(help="A recipe by name or a file.toml. Repeat to choose among several."),
    ],
    space: Annotated[
        Path, typer.Option(help='TOML lines such as "optimizer.lr" = {log = [1e-4, 1e-2]}.')
    ],
    out: Annotated[
        Path, typer.Option(help="The folder to make or to go on with; the best run is OUT/best.")
    ],
    trials: Annotated[int, typer.Option(min=1, help="Points to try; of a grid at most.")] = 20,
    sampler: Annotated[str, typer.Option(help="random, grid or tpe (needs optuna).")] = "random",
    seeds: Annotated[
        int, typer.Option(min=1, help="Fits of each point; it counts by their mean.")
    ] = 1,
    halving: Annotated[
        bool,
        typer.Option(
            "--halving",
            help="Stop two thirds early, again and again (successive halving).",
        ),
    ] = False,
    rungs: Annotated[
        int, typer.Option(min=2, help="Of --halving; with 3 the first stop is at a ninth.")
    ] = 3,
    keep_going: Annotated[
        bool, typer.Option("--keep-going", help="A trial that fails does not end the sweep.")
    ] = False,
    population: Annotated[int, typer.Option(min=1, help="Heads that train together at most.")] = 16,
    memory_gb: Annotated[
        float, typer.Option(min=0.01, help="Memory of heads that train together.")
    ] = 2.0,
    sampler_seed: Annotated[int, typer.Option(help="Seed of the points.")] = 0,
    train_split: Annotated[
        str | None, typer.Option(help="Default: train, or the only split.")
    ] = None,
    dev_split: Annotated[
        str | None, typer.Option(help="Default: a seeded share of the training images.")
    ] = None,
    dev_images: Annotated[
        int, typer.Option(min=1, help="Size of that share; at most a tenth.")
    ] = 500,
    dev_seed: Annotated[int, typer.Option(help="Seed of that share.")] = 0,
    seed: Annotated[int, typer.Option(help="First seed of weights, batches and dropout.")] = 0,
    image_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    text_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Write a checkpoint at most this often.")
    ] = 30.0,
    engine: Engine = "local",
    address: Address = None,
    ray_actors: RayActors = None,
    ray_cpus: RayCpus = None,
    ray_gpus: RayGpus = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Try many settings of recipes, heads of one structure together; all is chosen on the dev
    split.

    Killed or interrupted, the same command goes on.

    Example: apecache sweep store --recipe projection --space space.toml --trials 64 --out sweep
    --halving
    """
    with ending():
        choice("--sampler", sampler, ("random", "grid", "tpe"))
        cluster = ray_spec(engine, address=address, actors=ray_actors, cpus=ray_cpus, gpus=ray_gpus)
        from apecache.sweeps.space import load_space

        loaded = load_space(space, recipe)
        from apecache.store.reader import FeatureStore
        from apecache.sweeps.run import SweepSpec
        from apecache.train.batches import SplitSpec
        from apecache.train.head_data import FitSpec

        splits = SplitSpec(train=train_split, dev=dev_split, dev_images=dev_images, seed=dev_seed)
        fit = FitSpec(
            image_features,
            text_features=text_features,
            splits=splits,
            seed=seed,
            device=device,
            save_seconds=save_seconds,
        )
        # `choice` has checked it; the type of the field is a Literal, which an option is not.
        sampler_name: Any = sampler
        memory = int(memory_gb * 2**30)
        spec = SweepSpec(
            trials,
            sampler=sampler_name,
            seeds=seeds,
            seed=sampler_seed,
            halving=halving,
            keep_going=keep_going,
            population=population,
            memory_bytes=memory,
            rungs=rungs,
            fit=fit,
        )
        with results_only(cluster):
            run = run_on(cluster)
            report = run(
                FeatureStore.open(store),
                space=loaded,
                out=out,
                spec=spec,
                progress=show_trial,
            )
        from apecache.report.sweep_page import sweep_page

        page = sweep_page(out)
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
        show_table(f"{report.run}: trial {report.best.number} was the best on dev", columns, rows)
        typer.echo(f"the best again: {report.command}")
        typer.echo(f"the page with all trials: {page}")


def run_on(cluster: "RaySpec | None") -> Any:
    """Return `sweep` of the local engine, or of a Ray cluster."""
    if cluster is None:
        from apecache.sweeps.run import sweep

        return sweep
    # Only here: the cluster needs Ray, which is an extra.
    from apecache.cluster.sweep import sweep_on_ray

    return partial(sweep_on_ray, cluster=cluster)


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
