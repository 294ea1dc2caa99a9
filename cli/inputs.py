"""The options that say how a source of images and captions is opened.

They are the same in every command that takes a source.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from apecache.data.spec import OpenSpec, Role

SOURCE = (
    "A table, captions in JSON, tars, a folder of images, or hf-datasets:NAME; the README lists "
    "all."
)

ImageColumn = Annotated[
    str | None,
    typer.Option("--image-column", help="Name of the column of images. Default: guessed."),
]
CaptionColumn = Annotated[
    str | None,
    typer.Option("--caption-column", help="Name of the column of captions. Default: guessed."),
]
SplitColumn = Annotated[
    str | None,
    typer.Option("--split-column", help="Name of the column that holds the split. Default: split."),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split",
        "--split-column",
        help="Name of the column that holds the split. Default: split.",
    ),
]
"""`SplitColumn` of the commands that have no `--split` with another meaning."""
Restval = Annotated[
    bool,
    typer.Option(
        "--restval/--no-restval",
        help="Of a Karpathy file, take restval as train, or leave it out.",
    ),
]
SplitFile = Annotated[
    Path | None,
    typer.Option(
        "--split-file",
        help="TSV of key and split, or a folder of train.txt, val.txt, ….",
    ),
]
SplitFraction = Annotated[
    str | None,
    typer.Option(
        "--split-fraction",
        help=(
            "Shares like train=.9,val=.1, dealt out by a hash of the key; equal images stay "
            "together."
        ),
    ),
]
SplitSeed = Annotated[
    int, typer.Option("--split-seed", help="Another number deals --split-fraction out otherwise.")
]
SingleWriter = Annotated[
    bool,
    typer.Option(
        "--single-writer",
        help="Nobody else writes to STORE: object storage without put-if-absent will do.",
    ),
]
Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        help=(
            "Folder or s3://… of the image paths. Default: the table's own folder; of a store, as "
            "when made."
        ),
    ),
]


OPENING: dict[str, tuple[Any, Any]] = {
    "root": (Root, None),
    "image_column": (ImageColumn, None),
    "caption_column": (CaptionColumn, None),
    "split_column": (SplitColumn, None),
    "split_file": (SplitFile, None),
    "split_fraction": (SplitFraction, None),
    "split_seed": (SplitSeed, 0),
    "restval": (Restval, True),
}
"""The options of a source, and their defaults."""


def takes_source(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a source to a command.

    The command gets them as its argument `opening`: `opening(role, …)` makes the OpenSpec, and
    `opening.root` is the folder of the images, if one was given.
    """

    @wraps(command)
    def wrapped(**arguments: Any) -> None:
        source_options = {name: arguments.pop(name) for name in OPENING}
        command(opening=SourceOptions(source_options), **arguments)

    signature = inspect.signature(command)
    options = dict(OPENING)
    if "split" not in signature.parameters:
        options["split_column"] = (Split, None)
    parameters = []
    for name, parameter in signature.parameters.items():
        if name != "opening":
            parameters.append(parameter)
    for name, (annotation, default) in options.items():
        parameters.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=annotation,
            )
        )
    # Typer reads the signature and the annotations of the function that it is given.
    wrapped.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    annotations = {parameter.name: parameter.annotation for parameter in parameters}
    wrapped.__annotations__ = annotations
    return wrapped


class SourceOptions:
    """Hold the options of a source that were given on the command line."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.root: str | None = given["root"]

    def __call__(self, *require: "Role") -> "OpenSpec":
        """Return the OpenSpec of a source that must have these roles.

        Raises:
            OptionError: `--split-fraction` cannot be parsed.
        """
        from apecache.data.spec import OpenSpec
        from apecache.data.splits import parse_fractions

        text = self.given["split_fraction"]
        fractions = parse_fractions(text) if text is not None else ()
        return OpenSpec(**{**self.given, "split_fraction": fractions}, require=require)
