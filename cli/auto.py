"""`apecache auto` and `apecache forecast`: the best heads for one's data, and what would help."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .option_groups import (
    CompleteStore,
    Device,
    DevSplit,
    ImageFeatures,
    Json,
    Seed,
    TextFeatures,
    TrainSplit,
    View,
)
from .terminal import ending, show_json, show_table

if TYPE_CHECKING:
    from apecache.auto.budget import RungRecord
    from apecache.auto.forecast import ForecastReport


def auto(
    store: CompleteStore,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder to create or to resume. The run is OUT/best."),
    ],
    budget: Annotated[
        str,
        typer.Option(metavar="DURATION", help="Time for all fits, like 90s, 10m or 2h."),
    ] = "10m",
    image_features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Image features to choose among. Repeatable. Default: all pooled ones.",
        ),
    ] = None,
    text_features: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Text features to choose among. Repeatable. Default: all pooled ones.",
        ),
    ] = None,
    train_split: TrainSplit = None,
    dev_split: DevSplit = None,
    view: View = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the best heads for a store within a budget of time.

    Compares encoders, closed forms, families of heads and ensembles. A more complex candidate is
    kept only if it is better by a paired interval, over seeds and images that chose nothing.
    Interrupt at any time; run the same command to resume.

    Example: apecache auto store --out search --budget 15m
    """
    with ending():
        from apecache.auto.budget import parse_duration
        from apecache.auto.ladder import AutoSpec
        from apecache.auto.ladder import auto_heads as search
        from apecache.report.auto_page import write_auto_page
        from apecache.store.reader import FeatureStore
        from apecache.train.batches import SplitSpec

        spec = AutoSpec(
            budget_seconds=parse_duration(budget),
            image_features=tuple(image_features or ()),
            text_features=tuple(text_features or ()),
            splits=SplitSpec(train=train_split, dev=dev_split),
            seed=seed,
            device=device,
        )
        report = search(FeatureStore.open(store, view), out, spec, show_rung)
        page = write_auto_page(report, out / "index.html")
        if json:
            show_json(
                {
                    "run": str(report.run),
                    "chosen": report.chosen,
                    "commands": report.commands,
                    "seconds": report.spent_seconds,
                    "page": str(page),
                }
            )
            return
        rows = [(rung.name, rung.outcome, rung.seconds, rung.left_seconds) for rung in report.rungs]
        show_table(f"{report.run}: {report.chosen}", ("rung", "outcome", "seconds", "left"), rows)
        for command in report.commands:
            typer.echo(f"make it again: {command}")
        typer.echo(f"page with all rungs: {page}")


def show_rung(rung: "RungRecord") -> None:
    """Show a rung that ended on standard error."""
    typer.echo(
        f"{rung.name}: {rung.outcome} ({rung.seconds:.0f} s, {rung.left_seconds:.0f} s left)",
        err=True,
    )


def forecast(
    store: CompleteStore,
    out: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Folder for forecast.json and the page.")
    ],
    recipe: Annotated[
        str, typer.Option(metavar="RECIPE", help="Recipe of the heads, without --run.")
    ] = "projection",
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="Run of fit-head, whose recipe and features are used."),
    ] = None,
    image_features: ImageFeatures = None,
    text_features: TextFeatures = None,
    shares: Annotated[
        str,
        typer.Option(metavar="SHARES", help="Shares of the training images, with commas between."),
    ] = "0.0625,0.125,0.25,0.5,1",
    seeds: Annotated[int, typer.Option(min=1, help="Fits of each share.")] = 3,
    tower: Annotated[
        str | None,
        typer.Option(
            metavar="DURATION",
            help="Also train the last blocks of the text tower, for at most this long, like 5m.",
        ),
    ] = None,
    view: View = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Predict R@1 with more pairs, and measure what else would help.

    Heads are fitted on nested subsets. A power law continues their curve to 2, 5 and 10 times the
    images. Beside it stand the gains of other encoders in the store, and of several captions. With
    --tower one epoch of a trained text tower is measured too, which takes minutes.

    Example: apecache forecast store --run run --out forecast --tower 5m
    """
    with ending():
        from apecache.auto.budget import parse_duration
        from apecache.auto.forecast import ForecastSpec
        from apecache.auto.forecast import forecast as measure
        from apecache.errors import OptionError
        from apecache.report.auto_page import write_forecast_page
        from apecache.store.reader import FeatureStore

        try:
            share_values = tuple(float(share) for share in shares.split(","))
        except ValueError:
            raise OptionError(f"--shares {shares}: expected numbers with commas between") from None
        spec = ForecastSpec(
            recipe=recipe,
            run=run,
            image_features=image_features,
            text_features=text_features,
            shares=share_values,
            seeds=seeds,
            seed=seed,
            device=device,
            tower_seconds=None if tower is None else parse_duration(tower, "--tower"),
        )
        opened = FeatureStore.open(store, view)
        report = measure(opened, out, spec=spec, progress=show_fit, announce=show_cost)
        page = write_forecast_page(report, out / "index.html")
        if json:
            show_json({**report.to_json(), "page": str(page)})
            return
        show_forecast(report)
        typer.echo(f"page: {page}")


def show_fit(what: str, recall: float) -> None:
    """Show a fit that ended on standard error."""
    typer.echo(f"{what}: dev mean R@1 {recall:.1f}", err=True)


def show_cost(line: str) -> None:
    """Show what begins, and what it will cost, on standard error."""
    typer.echo(line, err=True)


def show_forecast(report: "ForecastReport") -> None:
    """Show the curve, its continuation and the measured gains."""
    rows: list[tuple[object, ...]] = []
    for point in report.curve:
        mean = sum(point.recalls) / len(point.recalls)
        rows.append((f"{point.n_images:,} images", mean, "measured"))
    for prediction in report.predictions:
        interval = f"predicted, {prediction.low:.1f} to {prediction.high:.1f}"
        rows.append((f"{prediction.n_images:,} images", prediction.recall, interval))
    for gain in report.gains:
        words = f"measured; {gain.baseline:.1f} without"
        if gain.paired_low is not None and gain.paired_high is not None:
            difference = gain.recall - gain.baseline
            words += f"; {difference:+.1f} ({gain.paired_low:+.1f} to {gain.paired_high:+.1f})"
        rows.append((gain.change, gain.recall, words))
    title = f"{report.recipe}: mean R@1 on dev, chance {report.chance:.1f}"
    show_table(title, ("training data", "mean R@1", ""), rows)
    for gain in report.gains:
        if gain.note:
            typer.echo(gain.note)
    if report.no_tower:
        typer.echo(f"no trial of the text tower: {report.no_tower}")
