"""`apecache fit-head` and `apecache fit-encoder`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .extract import encoder_specs
from .memory import keep_freed_memory
from .runs import opener
from .terminal import Device, Json, Overwrite, choice, ending, show_json, show_table, warn

TensorBoard = Annotated[
    Path | None,
    typer.Option(help="Write curves there too, for tensorboard --logdir (extra: track)."),
]


def fit_head(
    store: Annotated[str, typer.Argument(help="A complete feature store.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe by name (apecache recipes lists them) or a file.toml.")
    ],
    out: Annotated[str, typer.Option(help="The run folder to make; s3://… and the like too.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override: section.key=value. May be repeated."),
    ] = None,
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
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
    image_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    text_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Write a checkpoint at most this often.")
    ] = 30.0,
    report_split: Annotated[
        str, typer.Option(help="Will be reported: neither trained nor chosen on.")
    ] = "test",
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of this machine, in any currency: the ledger then tells the money.",
        ),
    ] = None,
    extract_report: Annotated[
        Path | None,
        typer.Option(
            help="What apecache extract --json printed: when the cache has paid for itself."
        ),
    ] = None,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Fit alignment heads on cached features; the epoch is chosen on a dev split, never on the
    reported one.

    A fit that was killed or interrupted goes on when the same command is given again.

    Example: apecache fit-head store --recipe ape --out run --set optimizer.lr=3e-4
    """
    with ending():
        from apecache.errors import RecipeError
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        if not loaded.trains_heads_alone:
            raise RecipeError(
                f"recipe {loaded.name} does not train heads alone; use apecache fit-encoder"
            )
        from apecache.runs.remote import kept_run
        from apecache.store.reader import FeatureStore
        from apecache.train.batches import SplitSpec
        from apecache.train.fit_head import fit_head as run
        from apecache.train.head_data import FitSpec

        splits = SplitSpec(train=train_split, dev=dev_split, dev_images=dev_images, seed=dev_seed)
        ledger_options: dict[str, Any] = {
            "report_split": report_split,
            "price_per_hour": price_per_hour,
            "extract_report": extract_report,
        }
        spec = FitSpec(
            image_features,
            text_features=text_features,
            splits=splits,
            seed=seed,
            device=device,
            overwrite=overwrite,
            save_seconds=save_seconds,
            **ledger_options,
        )
        with kept_run(out) as folder, told_epochs(tensorboard) as show:
            report = run(
                FeatureStore.open(store),
                recipe=loaded,
                out=folder,
                spec=spec,
                progress=show,
            )
        for warning in report.ledger.warnings:
            warn(warning)
        if json:
            show_json({**asdict(report), "run": out})
            return
        dev = report.dev
        recalls = (*dev.image_to_text.values(), *dev.text_to_image.values())
        chance = (*dev.chance_image_to_text.values(), *dev.chance_text_to_image.values())
        totals = (
            report.n_train_images,
            report.n_dev_images,
            report.n_negatives,
            report.n_trained_parameters,
        )
        names = (
            *(f"i2t R@{k}" for k in dev.image_to_text),
            *(f"t2i R@{k}" for k in dev.text_to_image),
        )
        show_table(
            f"{out}: epoch {report.best_epoch} of {report.n_epochs} was the best on dev",
            ("", "train images", "dev images", "negatives", "parameters", "seconds", *names),
            [("dev", *totals, report.seconds, *recalls), ("chance", *[""] * 5, *chance)],
        )


def fit_encoder(
    store: Annotated[
        str,
        typer.Argument(help="A complete feature store: its pairs, and features of frozen sides."),
    ],
    recipe: Annotated[
        str, typer.Option(help="A recipe by name (lit, lilt-i, freeze/Vuf-Tuu) or a file.toml.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make or to go on with.")],
    image: Annotated[
        str | None, typer.Option(help="Encoder of a live image side. Default: the store's.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Encoder of a live text side. Default: the store's.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Folder of the images, needed if the image tower trains.")
    ] = None,
    resolution: Annotated[
        int | None, typer.Option(min=16, help="Image side in pixels, with --image.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Longest caption in tokens, with --text.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Override: section.key=value. May be repeated."),
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            help="Run of fit-head on the same encoders: begin with its heads and temperature."
        ),
    ] = None,
    slice_size: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=1,
            help="Pairs in memory at once; gradients are the whole batch's.",
        ),
    ] = None,
    autocast: Annotated[
        str, typer.Option(help="Computation of the towers: float32 or bfloat16.")
    ] = "float32",
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
    seed: Annotated[int, typer.Option(help="Seed of weights, batches and dropout.")] = 0,
    image_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    text_features: Annotated[
        str | None, typer.Option(help="Which, if the store has several.")
    ] = None,
    save_seconds: Annotated[
        float, typer.Option(min=0, help="Write a checkpoint at most this often.")
    ] = 30.0,
    report_split: Annotated[
        str, typer.Option(help="Will be reported: neither trained nor chosen on.")
    ] = "test",
    price_per_hour: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Of this machine, in any currency: the ledger then tells the money.",
        ),
    ] = None,
    tensorboard: TensorBoard = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train within the towers what a recipe unlocks; a side that stays frozen is read from the
    cache.

    Killed or interrupted, the same command goes on after its last checkpoint. Under torchrun
    several processes train one model, with all of the batch as negatives. Any number of processes
    and any --slice give the same weights up to rounding, with dropout too.

    Example: apecache fit-encoder store --recipe lit --out run --slice 32

    Example: apecache fit-encoder store --recipe lilt-d --root images --init-from run-lilt-c --out
    run

    Example: torchrun --nproc-per-node 2 -m apecache fit-encoder store --recipe clip --root images
    --out run
    """
    with ending():
        choice("--autocast", autocast, ("float32", "bfloat16"))
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        images = encoder_specs(
            [image] if image else None,
            modality="image",
            cuts=None,
            dtype="float32",
            resolution=resolution,
        )
        texts = encoder_specs(
            [text] if text else None,
            modality="text",
            cuts=None,
            dtype="float32",
            max_tokens=max_tokens,
        )
        from apecache.store.reader import FeatureStore
        from apecache.train.batches import SplitSpec
        from apecache.train.encoder_data import FitEncoderSpec
        from apecache.train.fit_encoder import fit_encoder as run

        keep_freed_memory()

        splits = SplitSpec(train=train_split, dev=dev_split, dev_images=dev_images, seed=dev_seed)
        # `choice` has checked it; the type of the field is a Literal, which an option is not.
        precision: Any = autocast
        spec = FitEncoderSpec(
            next(iter(images), None),
            text=next(iter(texts), None),
            image_features=image_features,
            text_features=text_features,
            splits=splits,
            seed=seed,
            slice_size=slice_size,
            autocast=precision,
            device=device,
            overwrite=overwrite,
            save_seconds=save_seconds,
            report_split=report_split,
            price_per_hour=price_per_hour,
            init_from=init_from,
        )
        with told_epochs(tensorboard) as show:
            report = run(
                FeatureStore.open(store),
                recipe=loaded,
                out=out,
                spec=spec,
                open_image=opener(root),
                progress=show,
            )
        # Every process of a torchrun has a report; one of them shows it.
        if report.rank:
            return
        for warning in report.ledger.warnings:
            warn(warning)
        if json:
            show_json(report)
            return
        cached = ", ".join(report.cached) or "neither"
        values = (
            report.n_train_images,
            report.n_dev_images,
            report.n_trained_parameters,
            cached,
            report.seconds,
        )
        show_table(
            f"{out}: epoch {report.best_epoch} of {report.n_epochs} was the best on dev",
            (
                "train images",
                "dev images",
                "parameters",
                "cached sides",
                "seconds",
                "dev mean recall",
                "before",
                "chance",
            ),
            [
                (
                    *values,
                    report.dev.mean_recall,
                    report.untrained.mean_recall,
                    report.dev.mean_chance,
                )
            ],
        )


def ensemble(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more finished runs on the same features.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder to make.")],
    json: Json = False,
) -> None:
    """Put the heads of several runs side by side: cosines of the new heads are the mean of theirs.
    Nothing trains.

    Example: apecache ensemble run-linear run-mlp --out both
    """
    with ending():
        from apecache.errors import require_new
        from apecache.runs.ensemble import ensemble_heads
        from apecache.runs.heads import load_heads, save_heads
        from apecache.runs.load import require_head_run
        from apecache.storage.atomic import undone_on_error

        require_new(out, "run folder")
        for run in runs:
            require_head_run(run, "ensemble")
        combined = ensemble_heads([load_heads(run) for run in runs])
        # Half a folder would be refused as an existing run by the next call.
        with undone_on_error(out):
            save_heads(combined, out)
        result = {
            "run": str(out),
            "n_runs": len(runs),
            "dim": combined.image.head.out_dim,
            "scale": combined.scale,
        }
        if json:
            show_json(result)
        else:
            typer.echo(
                f"{out}: {len(runs)} runs side by side, {combined.image.head.out_dim} dimensions"
            )


@contextmanager
def told_epochs(tensorboard: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that takes every line of the history.

    It shows the line on the terminal, and writes it for TensorBoard if a folder is given.
    """
    if tensorboard is None:
        yield show_epoch
        return
    from apecache.train.tracking import log_to_tensorboard

    with log_to_tensorboard(tensorboard) as log:

        def tell(line: dict[str, Any]) -> None:
            show_epoch(line)
            log(line)

        yield tell


def show_epoch(line: dict[str, Any]) -> None:
    """Show an epoch on standard error, with chance beside its recall."""
    loss = "untrained" if line["loss"] is None else f"loss {line['loss']:.4f}"
    dev = line["dev"]
    recall = f"dev mean recall {dev['mean_recall']:.1f} (chance {dev['chance']:.1f})"
    typer.echo(f"epoch {line['epoch']:3d}  {loss}  {recall}", err=True)
