"""`apecache scout`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apecache.errors import counted

from .encoders import both_sides, encoder_specs
from .option_groups import (
    ADVANCED,
    Device,
    ImageCuts,
    ImageEncoders,
    Json,
    PairModels,
    Source,
    TextCuts,
    TextEncoders,
    takes_groups,
)
from .source_options import SourceOptions
from .terminal import ending, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.evaluate.scout import ScoutReport


@takes_groups
def scout(
    pairs: Source,
    source_options: SourceOptions,
    image: ImageEncoders = None,
    text: TextEncoders = None,
    model: PairModels = None,
    image_cut: ImageCuts = None,
    text_cut: TextCuts = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT",
            help="Split to draw the sample from. Default: train, or all images if there is none.",
        ),
    ] = None,
    n: Annotated[
        int,
        typer.Option("-n", "--pairs", min=24, help="Images in the sample, with one caption each."),
    ] = 1000,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of the sample.", rich_help_panel=ADVANCED)
    ] = 0,
    heat_map: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table as an SVG file.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare encoders, layers and poolings on a small sample, before extraction.

    Linear CKA and the agreement of nearest neighbors need no training. R@1 comes from a ridge
    regression that is fitted on one half of the sample and measured on the other half.

    Example: apecache scout pairs.tsv --image timm:vit_small_patch14_dinov2.lvd142m --image-cut
    default --image-cut mean@-2 --text hf:sentence-transformers/all-MiniLM-L6-v2 --heat-map
    scout.svg
    """
    with ending():
        from apecache.data.sources import open_pairs

        # The source is checked before the import of torch below.
        source = open_pairs(pairs, source_options.spec("image", "caption"))
        images = encoder_specs(
            both_sides(model, image),
            modality="image",
            cuts=image_cut,
            dtype="float32",
        )
        texts = encoder_specs(
            both_sides(model, text),
            modality="text",
            cuts=text_cut,
            dtype="float32",
        )
        from apecache.evaluate.scout import ScoutSpec, of_split
        from apecache.evaluate.scout import scout as run

        report = run(
            of_split(source, split),
            ScoutSpec(images, text=texts, n_pairs=n, seed=seed, device=device),
            show_progress,
        )
        if heat_map:
            write_heat_map(report, heat_map)
        show_report(report, json)


def write_heat_map(report: "ScoutReport", file: Path) -> None:
    """Write the table as heat maps into an SVG file."""
    from apecache.report.charts.heatmap import render_heat_maps, scout_maps

    file.write_text(render_heat_maps(scout_maps(report)), encoding="utf-8")


def show_progress(encoder: str, done: int, total: int) -> None:
    """Show one line for each encoder when it is done."""
    if done == total:
        typer.echo(f"{encoder}: {done:,} encoded", err=True)


def show_report(report: "ScoutReport", json: bool) -> None:
    """Show a row for each pair of cuts, and chance below them."""
    if report.n_unreadable:
        warn(f"left out of the sample: {counted(report.n_unreadable, 'unreadable image')}")
    if json:
        json_rows = [{"image": r.image, "text": r.text, **vars(r.likeness)} for r in report.rows]
        show_json({**vars(report), "rows": json_rows})
        return
    rows: list[tuple[object, ...]] = []
    for row in report.rows:
        likeness = row.likeness
        rows.append(
            (
                row.image,
                row.text,
                f"{likeness.cka:.3f}",
                f"{likeness.mutual_knn:.3f}",
                likeness.image_to_text,
                likeness.text_to_image,
                likeness.recall_at_1,
            )
        )
    rows.append(("chance", "", "", f"{report.chance_mutual_knn:.3f}", *[report.chance] * 3))
    columns = (
        "image",
        "text",
        "CKA",
        "mutual kNN",
        "image to text R@1",
        "text to image R@1",
        "mean R@1",
    )
    show_table(
        f"fitted on {report.n_fit:,} pairs, R@1 measured on {report.n_measured:,} other pairs",
        columns,
        rows,
    )
