"""`apecache fit-head`, `apecache fit-encoder` and `apecache ensemble`."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .encoders import encoder_specs
from .memory import keep_freed_memory
from .option_groups import (
    ADVANCED,
    COSTS,
    ENCODERS,
    SPLITS,
    CompleteStore,
    Device,
    FitOptions,
    ImagesFrom,
    Json,
    LedgerOptions,
    LiveRoot,
    MaxTokens,
    OptionGroup,
    Overwrite,
    Resolution,
    Settings,
    View,
    takes_groups,
)
from .runs import opener
from .terminal import choice, ending, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.encoders.spec import EncoderSpec
    from apecache.recipes.recipe import Recipe
    from apecache.train.encoder_data import FitEncoderSpec
    from apecache.train.fit_encoder import FitEncoderReport
    from apecache.train.fit_head import FitReport


@dataclass(frozen=True, kw_only=True)
class HeadLedgerOptions(LedgerOptions):
    """Hold what goes into the record of a fit of heads."""

    extract_report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Output of apecache extract --json. Adds to the costs after how many fits the "
            "cache has paid off.",
            rich_help_panel=COSTS,
        ),
    ] = None


@takes_groups
def fit_head(
    store: CompleteStore,
    recipe: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            help="Name of a recipe, or a TOML file. apecache recipes lists the names.",
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            metavar="FOLDER",
            help="Run folder to create or to resume: a folder, s3://…, gs://… or az://….",
        ),
    ],
    fit: FitOptions,
    ledger: HeadLedgerOptions,
    set_: Settings = None,
    view: View = None,
    keep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep list of apecache curate. Only its pairs train.",
            rich_help_panel=SPLITS,
        ),
    ] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train alignment heads on the features of a store.

    The best epoch is chosen on the dev split, never on the split that you report. Interrupt at any
    time; run the same command to resume.

    Example: apecache fit-head store --recipe ape --out run --set optimizer.lr=3e-4
    """
    with ending():
        from apecache.errors import RecipeError
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        # Before the imports of the trainer, which take seconds.
        if not loaded.trains_heads_alone:
            remedy = "use apecache fit-encoder"
            raise RecipeError(f"recipe {loaded.name} trains more than heads: {remedy}")
        from apecache.runs.remote import kept_run
        from apecache.store.reader import FeatureStore
        from apecache.train.fit_head import fit_head as run
        from apecache.train.head_data import FitSpec

        spec = FitSpec(
            fit.image_features,
            text_features=fit.text_features,
            splits=fit.splits,
            seed=fit.seed,
            device=device,
            overwrite=overwrite,
            save_seconds=fit.save_seconds,
            report_split=ledger.report_split,
            price_per_hour=ledger.price_per_hour,
            keep=keep,
            extract_report=ledger.extract_report,
        )
        with (
            kept_run(out) as folder,
            epoch_display(ledger, out, loaded) as show,
        ):
            features = FeatureStore.open(store, view)
            report = run(features, recipe=loaded, out=folder, spec=spec, progress=show)
        show_head_fit(report, out, json)


def show_head_fit(report: "FitReport", out: str, json: bool) -> None:
    """Show the recalls of a fit on its dev split, with chance below them."""
    for warning in report.ledger.warnings:
        warn(warning)
    if json:
        show_json({**asdict(report), "run": out})
        return
    dev = report.dev
    totals = (
        report.n_train_images,
        report.n_dev_images,
        report.n_negatives,
        report.n_trained_parameters,
        report.seconds,
    )
    recalls = (*dev.image_to_text.values(), *dev.text_to_image.values())
    chance = (*dev.chance_image_to_text.values(), *dev.chance_text_to_image.values())
    recall_names = (
        *(f"i2t R@{k}" for k in dev.image_to_text),
        *(f"t2i R@{k}" for k in dev.text_to_image),
    )
    total_names = ("train images", "dev images", "negatives", "parameters", "seconds")
    best = f"best epoch on dev: {report.best_epoch} of {report.n_epochs}"
    show_table(
        f"{out}: {best if report.n_epochs else 'closed form, without epochs'}",
        ("", *total_names, *recall_names),
        [("dev", *totals, *recalls), ("chance", *[""] * len(totals), *chance)],
    )


@dataclass(frozen=True, kw_only=True)
class TowerOptions(OptionGroup):
    """Hold the options of towers that train, or that run in every step."""

    image: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Image encoder, if its tower trains. Default: the store's.",
            rich_help_panel=ENCODERS,
        ),
    ] = None
    text: Annotated[
        str | None,
        typer.Option(
            metavar="ENCODER",
            help="Text encoder, if its tower trains. Default: the store's.",
            rich_help_panel=ENCODERS,
        ),
    ] = None
    resolution: Resolution = None
    max_tokens: MaxTokens = None
    init_from: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Start with the heads and the temperature of this run of fit-head.",
            rich_help_panel=ENCODERS,
        ),
    ] = None
    slice_size: Annotated[
        int | None,
        typer.Option(
            "--slice",
            min=1,
            help="Pairs in memory at once. The gradients stay those of the whole batch.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    autocast: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the computation: float32, bfloat16, or auto: bfloat16 on CUDA, else "
            "float32.",
            rich_help_panel=ADVANCED,
        ),
    ] = "auto"
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the towers with torch.compile. Weights change by rounding only.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    def image_encoder(self) -> "EncoderSpec | None":
        """Return the image encoder; None for the store's."""
        specs = encoder_specs(
            [self.image] if self.image else None,
            modality="image",
            cuts=None,
            dtype="float32",
            resolution=self.resolution,
        )
        return next(iter(specs), None)

    def text_encoder(self) -> "EncoderSpec | None":
        """Return the text encoder; None for the store's."""
        specs = encoder_specs(
            [self.text] if self.text else None,
            modality="text",
            cuts=None,
            dtype="float32",
            max_tokens=self.max_tokens,
        )
        return next(iter(specs), None)


@takes_groups
def fit_encoder(
    store: Annotated[
        str,
        typer.Argument(help="A complete feature store, with features of every frozen tower."),
    ],
    recipe: Annotated[
        str,
        typer.Option(
            metavar="RECIPE",
            help="Name of a recipe (lit, lilt-i, freeze/Vuf-Tuu, …), or a TOML file.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Run folder to create or to resume.")],
    towers: TowerOptions,
    fit: FitOptions,
    ledger: LedgerOptions,
    root: LiveRoot = None,
    source: ImagesFrom = None,
    set_: Settings = None,
    view: View = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train layers of the encoders, together with the heads.

    The recipe says which layers train. A frozen tower is read from the store. Interrupt at any
    time; run the same command to resume from the last checkpoint.

    With torchrun, several processes train one model. The negatives come from the whole batch. The
    number of processes and --slice change the weights only by rounding.

    Example: apecache fit-encoder store --recipe lit --out run --slice 32

    Example: apecache fit-encoder store --recipe lilt-d --root images --init-from run-lilt-c --out
    run

    Example: torchrun --nproc-per-node 2 -m apecache fit-encoder store --recipe clip --root images
    --out run
    """
    with ending():
        choice("--autocast", towers.autocast, ("auto", "float32", "bfloat16"))
        from apecache.recipes.recipe import load_recipe

        loaded = load_recipe(recipe, set_ or ())
        spec = fit_encoder_spec(towers, fit, ledger, overwrite=overwrite, device=device)
        from apecache.store.reader import FeatureStore
        from apecache.train.fit_encoder import fit_encoder as run

        opened = FeatureStore.open(store, view)
        open_image = opener(root, opened, source)
        with epoch_display(ledger, str(out), loaded) as show:
            report = run(
                opened,
                recipe=loaded,
                out=out,
                spec=spec,
                open_image=open_image,
                progress=show,
            )
        # Every process of a torchrun has a report; one of them shows it.
        if not report.rank:
            show_encoder_fit(report, out, json)


def fit_encoder_spec(
    towers: TowerOptions,
    fit: FitOptions,
    ledger: LedgerOptions,
    overwrite: bool,
    device: str,
) -> "FitEncoderSpec":
    """Return the settings of a fit."""
    image = towers.image_encoder()
    text = towers.text_encoder()
    from apecache.train.encoder_data import FitEncoderSpec

    keep_freed_memory()
    # `choice` has checked it; the type of the field is a Literal, which an option is not.
    precision: Any = towers.autocast
    return FitEncoderSpec(
        image,
        text=text,
        image_features=fit.image_features,
        text_features=fit.text_features,
        splits=fit.splits,
        seed=fit.seed,
        slice_size=towers.slice_size,
        autocast=precision,
        compile=towers.compiled,
        device=device,
        overwrite=overwrite,
        save_seconds=fit.save_seconds,
        report_split=ledger.report_split,
        price_per_hour=ledger.price_per_hour,
        init_from=towers.init_from,
    )


def show_encoder_fit(report: "FitEncoderReport", out: Path, json: bool) -> None:
    """Show the mean recall of a fit on its dev split, beside the one before training and chance."""
    for warning in report.ledger.warnings:
        warn(warning)
    if json:
        show_json(report)
        return
    row = (
        report.n_train_images,
        report.n_dev_images,
        report.n_trained_parameters,
        ", ".join(report.cached) or "neither",
        report.seconds,
        report.dev.mean_recall,
        report.untrained.mean_recall,
        report.dev.mean_chance,
    )
    columns = (
        "train images",
        "dev images",
        "parameters",
        "cached towers",
        "seconds",
        "dev mean recall",
        "before training",
        "chance",
    )
    show_table(
        f"{out}: best epoch on dev: {report.best_epoch} of {report.n_epochs}",
        columns,
        [row],
    )


def ensemble(
    runs: Annotated[
        list[Path], typer.Argument(help="Two or more finished runs on the same features.")
    ],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Run folder to create.")],
    json: Json = False,
) -> None:
    """Combine the heads of several runs into one run, without training.

    The cosine of two embeddings is then the mean of the cosines of the single runs.

    Example: apecache ensemble run-linear run-mlp --out both
    """
    with ending():
        from apecache.errors import require_new
        from apecache.runs.ensemble import ensemble_heads
        from apecache.runs.heads import load_heads, save_heads
        from apecache.runs.load import require_head_run
        from apecache.storage.replace import undone_on_error

        # Before the runs are read.
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
                f"{out}: {len(runs)} runs combined, {combined.image.head.out_dim} dimensions"
            )


@contextmanager
def epoch_display(
    ledger: LedgerOptions,
    out: str,
    recipe: "Recipe",
) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Show every line of the history on the terminal, and log it where it was asked for.

    Args:
        ledger: The trackers.
        out: The run folder, whose name is that of the run in a tracker.
        recipe: The recipe, whose settings are logged.

    Yields:
        A function to call with every line of the history.
    """
    trackers = list(ledger.track or ())
    if ledger.tensorboard is not None:
        trackers.append(f"tensorboard={ledger.tensorboard}")
    # A closed form has no step: its heads are finished at epoch 0.
    show = partial(show_epoch, at_first="before training" if recipe.has_steps else "closed form")
    if not trackers:
        yield show
        return
    from apecache.train.trackers import parse_tracker, track_fit

    # All of them are checked before the first one opens a run at its service.
    for tracker in trackers:
        parse_tracker(tracker)
    # A URL is no path: its last part is taken as text.
    name = out.rstrip("/").rpartition("/")[2]
    with ExitStack() as stack:
        logs = [
            stack.enter_context(track_fit(tracker, name, recipe.model_dump(mode="json")))
            for tracker in trackers
        ]

        def show_and_log(line: dict[str, Any]) -> None:
            show(line)
            for log in logs:
                log(line)

        yield show_and_log


def show_epoch(line: dict[str, Any], at_first: str) -> None:
    """Show an epoch on standard error, with chance beside its recall.

    Args:
        line: A line of the history.
        at_first: What stands in place of the loss at epoch 0, which has none.
    """
    loss = at_first if line["loss"] is None else f"loss {line['loss']:.4f}"
    dev = line["dev"]
    recall = f"dev mean recall {dev['mean_recall']:.1f} (chance {dev['chance']:.1f})"
    if "map_at_r" in dev:
        # The epoch is chosen by it, because few captions of the dev split differ.
        recall = f"dev mAP@R {dev['map_at_r']:.1f} (chooses the epoch), {recall[4:]}"
    typer.echo(f"epoch {line['epoch']:3d}  {loss}  {recall}", err=True)
