"""The options that say how a source of images and captions is opened: the same in every command
that takes one."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

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
"""The same where no split is asked for by name."""
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
    """A command with the options of a source besides its own. It gets them as one argument:
    `opening(require, …)` makes the OpenSpec, and `opening.root` is the folder of the images, if one
    was given."""

    @wraps(command)
    def wrapped(**given: Any) -> None:
        command(opening=Opening({name: given.pop(name) for name in OPENING}), **given)

    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != "opening"]
    options = (
        OPENING if "split" in signature.parameters else {**OPENING, "split_column": (Split, None)}
    )
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(n, keyword, default=value, annotation=kind)
        for n, (kind, value) in options.items()
    ]
    wrapped.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {each.name: each.annotation for each in (*own, *added)}
    return wrapped


class Opening:
    """What was said about a source on the command line."""

    def __init__(self, given: dict[str, Any]) -> None:
        self.given = given
        self.root: str | None = given["root"]

    def __call__(self, *require: Any) -> Any:
        """An OpenSpec of a source that must have these roles."""
        from apecache.data.spec import OpenSpec
        from apecache.data.splits import parse_fractions

        text = self.given["split_fraction"]
        fractions = parse_fractions(text) if text is not None else ()
        return OpenSpec(**{**self.given, "split_fraction": fractions}, require=require)
