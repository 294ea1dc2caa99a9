"""Options that several commands share, each written once.

An option is an annotated type. Options that always come together are an `OptionGroup`: a command
takes the group as one parameter, and `takes_groups` gives Typer its options.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from apecache.train.batches import SplitSpec

# Panels of the help. Options without a panel come first: the ones that most users need.
ENCODERS = "Encoders"
STORE_PANEL = "Store"
SOURCE_PANEL = "Source of images and captions"
SPLITS = "Splits and seeds"
FEATURES = "Features"
COSTS = "Costs"
SEVERAL_MACHINES = "Several machines"
ADVANCED = "Advanced"

SOURCE = (
    "Images and captions: a table, a JSON file of captions, tar files, a folder of images, or "
    "hf-datasets:NAME. The page Sources of the documentation lists all formats."
)
CUT = (
    "Features to take: default (what the encoder uses), cls, mean, max, cls+mean or "
    "tokens. Add @LAYER to stop after that many blocks, e.g. mean@-2. Repeatable."
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Device = Annotated[
    str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output of an earlier run.")
]

Source = Annotated[str, typer.Argument(help=SOURCE)]
View = Annotated[
    str | None,
    typer.Option(
        "--view",
        metavar="VIEW",
        help="View of the store: its id or number in apecache views list. Default: the newest.",
        rich_help_panel=ADVANCED,
    ),
]
CompleteStore = Annotated[str, typer.Argument(help="A complete feature store.")]
MaxBad = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        metavar="SHARE",
        help="Share of unreadable rows above which the command fails.",
        rich_help_panel=ADVANCED,
    ),
]
SingleWriter = Annotated[
    bool,
    typer.Option(
        "--single-writer",
        help="Declare that no other process writes to STORE. Needed for object storage without "
        "put-if-absent.",
        rich_help_panel=ADVANCED,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Run on a Ray cluster (extra: ray): auto, local or HOST:PORT. Resources may follow: "
        "auto,actors=4,cpus=2,gpus=1. By default, actors of 1 CPU and 1 GPU fill the cluster.",
        rich_help_panel=SEVERAL_MACHINES,
    ),
]

ImageEncoders = Annotated[
    list[str] | None,
    typer.Option(
        "--image",
        metavar="ENCODER",
        help="Image encoder: timm:NAME, hf:ID, open_clip:NAME/TAG or LIBRARY:/folder. Repeatable.",
    ),
]
TextEncoders = Annotated[
    list[str] | None,
    typer.Option(
        "--text",
        metavar="ENCODER",
        help="Text encoder: hf:ID, st:ID, open_clip:NAME/TAG or LIBRARY:/folder. Repeatable.",
    ),
]
PairModels = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="ENCODER",
        help="Image-text model (CLIP, SigLIP, …) as both encoders: hf:ID, open_clip:NAME/TAG, "
        "st:ID or LIBRARY:/folder. Repeatable.",
    ),
]
ImageCuts = Annotated[
    list[str] | None,
    typer.Option("--image-cut", metavar="CUT", help=CUT, rich_help_panel=ENCODERS),
]
TextCuts = Annotated[
    list[str] | None,
    typer.Option(
        "--text-cut",
        metavar="CUT",
        help="The same for texts. Texts also have: last (the last token).",
        rich_help_panel=ENCODERS,
    ),
]
Resolution = Annotated[
    int | None,
    typer.Option(
        min=16,
        metavar="PIXELS",
        help="Side of the input image. Default: the encoder's.",
        rich_help_panel=ENCODERS,
    ),
]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        min=2,
        metavar="N",
        help="Longest caption in tokens. Default: the encoder's.",
        rich_help_panel=ENCODERS,
    ),
]
MovedImage = Annotated[
    str | None,
    typer.Option(
        "--image",
        metavar="ENCODER",
        help="New location of the image encoder, if its folder has moved.",
        rich_help_panel=ADVANCED,
    ),
]
MovedText = Annotated[
    str | None,
    typer.Option(
        "--text",
        metavar="ENCODER",
        help="New location of the text encoder, if its folder has moved.",
        rich_help_panel=ADVANCED,
    ),
]

Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        metavar="TRACKER",
        help="Also log to wandb, trackio or mlflow (extras of these names), with =PROJECT if it "
        "is not apecache; or tensorboard=FOLDER (extra: track). Repeatable.",
        rich_help_panel=ADVANCED,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting of the recipe, e.g. optimizer.lr=3e-4. Repeatable.",
    ),
]
TrainSplit = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        help="Split to train on. Default: train, or the only split.",
        rich_help_panel=SPLITS,
    ),
]
DevSplit = Annotated[
    str | None,
    typer.Option(
        metavar="SPLIT",
        help="Split on which the best epoch is chosen. Default: a random share of the training "
        "images.",
        rich_help_panel=SPLITS,
    ),
]
ReportSplit = Annotated[
    str,
    typer.Option(
        metavar="SPLIT",
        help="Split of your final figures. Training or choosing on it is refused.",
        rich_help_panel=SPLITS,
    ),
]
Seed = Annotated[
    int,
    typer.Option(help="Seed of weights, batches and dropout.", rich_help_panel=SPLITS),
]
ImageFeatures = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Image features to use, if the store has several. A,B: both, side by side.",
        rich_help_panel=FEATURES,
    ),
]
TextFeatures = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Text features to use, if the store has several. A,B: both, side by side.",
        rich_help_panel=FEATURES,
    ),
]
PricePerHour = Annotated[
    float | None,
    typer.Option(
        min=0,
        metavar="PRICE",
        help="Price of one hour of this machine, in any currency. Adds money to the costs.",
        rich_help_panel=COSTS,
    ),
]

Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="FOLDER",
        help="Folder of the image paths, or s3://…. Default: where the images were at extraction.",
        rich_help_panel=SOURCE_PANEL,
    ),
]
LiveRoot = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="FOLDER",
        help="Folder of the images, if the image tower is trained. Default: where they were at "
        "extraction.",
    ),
]
ImagesFrom = Annotated[
    str | None,
    typer.Option(
        "--source",
        metavar="SOURCE",
        help="New location of the source that was given to extract. Default: where it was.",
        rich_help_panel=SOURCE_PANEL,
    ),
]


class OptionGroup:
    """Mark a dataclass whose fields are options; `takes_groups` expands it."""


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is an option group by the options of that group.

    Returns:
        A function that takes all options by keyword, and calls `command` with the groups.
    """
    groups: dict[str, type[OptionGroup]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        annotation = parameter.annotation
        if isinstance(annotation, type) and issubclass(annotation, OptionGroup):
            groups[name] = annotation
            parameters.extend(_parameters_of(annotation))
        else:
            # By keyword only, because typer passes all values by name.
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @wraps(command)
    def expanded(**arguments: Any) -> None:
        for name, group in groups.items():
            values = {field: arguments.pop(field) for field in _field_names(group)}
            arguments[name] = group(**values)
        command(**arguments)

    # Typer reads the signature and the annotations of the function that it is given.
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    expanded.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return expanded


def _field_names(group: Any) -> list[str]:
    return [field.name for field in fields(group)]


def _parameters_of(group: Any) -> Iterator[inspect.Parameter]:
    """Yield a parameter for each field of a group."""
    for field in fields(group):
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        yield inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=field.type,
        )


@dataclass(frozen=True, kw_only=True)
class FitOptions(OptionGroup):
    """Hold the options of every command that trains: splits, seeds, features, checkpoints."""

    train_split: TrainSplit = None
    dev_split: DevSplit = None
    dev_images: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            help="Images of the random dev split. At most a tenth of the training images.",
            rich_help_panel=SPLITS,
        ),
    ] = 500
    dev_seed: Annotated[
        int, typer.Option(help="Seed of the random dev split.", rich_help_panel=SPLITS)
    ] = 0
    seed: Seed = 0
    image_features: ImageFeatures = None
    text_features: TextFeatures = None
    save_seconds: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Least time between two checkpoints.",
            rich_help_panel=ADVANCED,
        ),
    ] = 30.0

    @property
    def splits(self) -> "SplitSpec":
        """Return the training and the dev split."""
        from apecache.train.batches import SplitSpec

        return SplitSpec(
            train=self.train_split,
            dev=self.dev_split,
            dev_images=self.dev_images,
            seed=self.dev_seed,
        )


@dataclass(frozen=True, kw_only=True)
class LedgerOptions(OptionGroup):
    """Hold the options that go into the record of a single fit."""

    report_split: ReportSplit = "test"
    price_per_hour: PricePerHour = None
    tensorboard: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Also write the curves for TensorBoard (extra: track).",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    track: Track = None
