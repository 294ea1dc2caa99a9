"""`apecache fit-head`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .terminal import Device, Json, Overwrite, ending, show_json, show_table


def fit_head(
    store: Annotated[Path, typer.Argument(help="A complete feature store.")],
    recipe: Annotated[str, typer.Option(help="A recipe by name (apecache recipes lists them) or a file.toml.")],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override: section.key=value. May be repeated.")
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="Default: train, or the only split.")] = None,
    dev_split: Annotated[str | None, typer.Option(help="Default: a seeded share of the training images.")] = None,
    dev_images: Annotated[int, typer.Option(min=1, help="Size of that share; at most a tenth.")] = 500,
    dev_seed: Annotated[int, typer.Option(help="Seed of that share.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
    image_features: Annotated[str | None, typer.Option(help="Which, if the store has several.")] = None,
    text_features: Annotated[str | None, typer.Option(help="Which, if the store has several.")] = None,
    save_seconds: Annotated[float, typer.Option(min=0, help="Write a checkpoint at most this often.")] = 30.0,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fit alignment heads on cached features; the epoch is chosen on a dev split, never on the reported one.

    A fit that was killed or interrupted goes on when the same command is given again.

    Example: apecache fit-head store --recipe ape --out run --set optimiser.lr=3e-4
    """
    with ending():
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        from apecache.store.reader import FeatureStore
        from apecache.train.batches import SplitSpec
        from apecache.train.fit_head import FitSpec
        from apecache.train.fit_head import fit_head as run

        splits = SplitSpec(train_split, dev_split, dev_images, dev_seed)
        spec = FitSpec(image_features, text_features, splits, seed, device, overwrite, save_seconds)
        report = run(FeatureStore.open(store), loaded, out, spec, show_epoch)
        if json:
            show_json(report)
            return
        recalls = (*report.dev.image_to_text.values(), *report.dev.text_to_image.values())
        counts = (report.n_train_images, report.n_dev_images, report.n_negatives, report.n_trained_parameters)
        names = (*(f"i2t R@{k}" for k in report.dev.image_to_text), *(f"t2i R@{k}" for k in report.dev.text_to_image))
        show_table(
            f"{out}: epoch {report.best_epoch} of {report.n_epochs} was the best on dev",
            ("train images", "dev images", "negatives", "parameters", "seconds", *names),
            [(*counts, report.seconds, *recalls)],
        )


def combine(
    runs: Annotated[list[Path], typer.Argument(help="Two or more finished runs on the same features.")],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    json: Json = False,
) -> None:
    """Put the heads of several runs side by side: cosines of the new heads are the mean of theirs. Nothing trains.

    Example: apecache combine run-linear run-mlp --out both
    """
    with ending():
        from apecache.errors import require_new
        from apecache.heads.checkpoint import load_heads, save_heads
        from apecache.heads.combine import combine_heads

        require_new(out, "run folder")
        combined = combine_heads([load_heads(run) for run in runs])
        save_heads(combined, out)
        found = {"run": str(out), "n_runs": len(runs), "dim": combined.image.head.out_dim, "scale": combined.scale}
        if json:
            show_json(found)
        else:
            typer.echo(f"{out}: {len(runs)} runs side by side, {combined.image.head.out_dim} dimensions")


def show_epoch(line: dict[str, Any]) -> None:
    loss = "untrained" if line["loss"] is None else f"loss {line['loss']:.4f}"
    typer.echo(f"epoch {line['epoch']:3d}  {loss}  dev mean recall {line['dev']['mean_recall']:.1f}", err=True)
