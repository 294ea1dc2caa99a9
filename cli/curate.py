"""`apecache curate`: look for wrong captions and other faults of the pairs in a store."""

from pathlib import Path
from typing import Annotated

import typer

from .option_groups import (
    ADVANCED,
    CompleteStore,
    Device,
    ImageFeatures,
    Json,
    Seed,
    TextFeatures,
    TrainSplit,
    View,
)
from .runs import opener
from .terminal import command_line, ending, show_json, show_table


def curate(
    store: CompleteStore,
    out: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="Folder for the page, the keep list and the findings."),
    ],
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Run of fit-head, whose recipe scores the captions.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="RECIPE", help="Recipe that scores, without --run. Default: cca."),
    ] = None,
    train_split: TrainSplit = None,
    image_features: ImageFeatures = None,
    text_features: TextFeatures = None,
    probability: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Leave out captions that are wrong with this probability."
        ),
    ] = 0.5,
    root: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Folder of the images. Puts pictures on the page."),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            min=2,
            help="Folds. A caption is scored by heads of the other folds.",
            rich_help_panel=ADVANCED,
        ),
    ] = 5,
    near: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=1,
            help="Cosine from which items of two splits are near copies.",
            rich_help_panel=ADVANCED,
        ),
    ] = 0.95,
    view: View = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find wrong captions, near copies across splits, and gaps.

    Writes index.html, keep.tsv and curate.json into FOLDER. Give keep.tsv to fit-head --keep to
    train without the captions that are likely wrong. With --root the page has pictures.

    Example: apecache curate store --run run --out curated --root images
    """
    with ending():
        from apecache.auto.curate import CurateSpec
        from apecache.auto.curate import curate as examine
        from apecache.report.curate_page import write_curate_page
        from apecache.store.reader import FeatureStore

        spec = CurateSpec(
            run=run,
            recipe=recipe,
            image_features=image_features,
            text_features=text_features,
            train_split=train_split,
            n_folds=folds,
            seed=seed,
            least_probability=probability,
            near=near,
            device=device,
        )
        report = examine(FeatureStore.open(store, view), out, spec)
        page = write_curate_page(
            report,
            out / "index.html",
            open_image=opener(root),
            commands=(command_line(),),
        )
        if json:
            show_json({**report.to_json(), "page": str(page), "keep": str(out / "keep.tsv")})
            return
        rows = [
            ("training captions", report.n_captions),
            ("estimated share wrong, %", 100 * report.share_wrong),
            ("left out of the keep list", report.n_dropped),
            ("images that no caption describes", len(report.undescribed)),
            ("near copies of images across splits", len(report.near_images)),
            ("near copies of captions across splits", len(report.near_captions)),
        ]
        show_table(f"{page}", ("finding", "count"), rows)
        of_view = "" if view is None else f" --view {view}"
        typer.echo(
            f"train without them: apecache fit-head {store}{of_view} --keep {out / 'keep.tsv'} ..."
        )
