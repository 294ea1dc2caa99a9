"""Options that say how a source of images and captions is opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .option_groups import ADVANCED, SOURCE_PANEL, OptionGroup
from .terminal import choice

if TYPE_CHECKING:
    from apecache.data.spec import OpenSpec, Role


def _source_option(*flags: str, metavar: str, help: str, panel: str = SOURCE_PANEL) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=panel)


SPLIT_COLUMN_HELP = "Column of the split. Default: split."


@dataclass(frozen=True, kw_only=True)
class SourceOptions(OptionGroup):
    """Hold the options that say how a source of images and captions is opened."""

    root: Annotated[
        str | None,
        _source_option(
            "--root",
            metavar="FOLDER",
            help="Folder of the image paths, or s3://…. Default: the folder of the table.",
        ),
    ] = None
    image_column: Annotated[
        str | None,
        _source_option(
            "--image-column",
            metavar="NAME",
            help="Column of the images. Default: detected.",
        ),
    ] = None
    caption_column: Annotated[
        list[str] | None,
        _source_option(
            "--caption-column",
            metavar="NAME",
            help="Column of captions; may have wildcards (caption_*). Default: detected. "
            "Repeatable.",
        ),
    ] = None
    caption_template: Annotated[
        str | None,
        _source_option(
            "--caption-template",
            metavar="TEXT",
            help="Caption made of several columns, e.g. '{title}. {description}'.",
        ),
    ] = None
    label_column: Annotated[
        str | None,
        _source_option(
            "--label-column",
            metavar="NAME",
            help="Column of the labels. Default: label or fine_label.",
        ),
    ] = None
    key_column: Annotated[
        str | None,
        _source_option(
            "--key-column",
            metavar="NAME",
            help="Column of the images' names, such as a SKU. Default: the path of the image.",
        ),
    ] = None
    split_column: Annotated[
        str | None,
        _source_option("--split-column", metavar="NAME", help=SPLIT_COLUMN_HELP),
    ] = None
    split_file: Annotated[
        Path | None,
        _source_option(
            "--split-file",
            metavar="PATH",
            help="Splits as a TSV file of key and split, or a folder with train.txt, val.txt, ….",
        ),
    ] = None
    split_fraction: Annotated[
        str | None,
        _source_option(
            "--split-fraction",
            metavar="SHARES",
            help="Random splits, e.g. train=.9,val=.1. Copies of an image get the same split. "
            "Add seed=N for a different split.",
        ),
    ] = None
    separator: Annotated[
        str | None,
        _source_option(
            "--separator",
            metavar="CHARACTER",
            help="Separator of a table: a character, or tab, comma, semicolon, bar. Default: "
            "detected.",
            panel=ADVANCED,
        ),
    ] = None
    quoting: Annotated[
        str | None,
        _source_option(
            "--quoting",
            metavar="RULE",
            help="Whether cells of a table may be quoted: csv or none. Default: csv for commas and "
            "semicolons; for tabs, if all quotes are those of a CSV writer.",
            panel=ADVANCED,
        ),
    ] = None
    allow_root: Annotated[
        list[Path] | None,
        _source_option(
            "--allow-root",
            metavar="FOLDER",
            help="Folder outside the source that links may lead to. Repeatable.",
            panel=ADVANCED,
        ),
    ] = None
    image_ext: Annotated[
        str | None,
        _source_option(
            "--image-ext",
            metavar="ENDING",
            help="Ending of the image in a tar's samples, e.g. input.jpg. Default: detected.",
            panel=ADVANCED,
        ),
    ] = None
    caption_ext: Annotated[
        str | None,
        _source_option(
            "--caption-ext",
            metavar="ENDING",
            help="Ending of the caption beside an image or in a tar. Default: txt or caption.",
            panel=ADVANCED,
        ),
    ] = None
    caption_lines: Annotated[
        bool,
        typer.Option(
            "--caption-lines",
            help="Read each line of a text beside an image as a caption. Default: only where "
            "clip_benchmark's dataset_type.txt says retrieval.",
            rich_help_panel=ADVANCED,
        ),
    ] = False
    scale: Annotated[
        str,
        _source_option(
            "--scale",
            metavar="LO,HI",
            help="Samples that become black and white in images of one channel with more than 8 "
            "bits, e.g. 0,4095. auto: the smallest usual range that holds the image's samples.",
            panel=ADVANCED,
        ),
    ] = "auto"
    max_pixels: Annotated[
        int | None,
        typer.Option(
            "--max-pixels",
            min=1,
            metavar="N",
            help="Largest number of pixels of an image; larger ones count as unreadable. Default: "
            "50,000,000.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    no_restval: Annotated[
        bool,
        typer.Option(
            "--no-restval",
            help="Leave out the split restval of a Karpathy file. Default: part of train.",
            rich_help_panel=ADVANCED,
        ),
    ] = False

    def spec(self, *require: "Role") -> "OpenSpec":
        """Return the OpenSpec of a source that must have these roles.

        Raises:
            OptionError: `--split-fraction` or `--scale` cannot be parsed.
        """
        from apecache.data.pixels import parse_scale
        from apecache.data.spec import OpenSpec
        from apecache.data.splits import parse_fractions

        fractions: tuple[tuple[str, float], ...] = ()
        split_seed = 0
        if self.split_fraction is not None:
            shares, split_seed = split_seed_of(self.split_fraction)
            fractions = parse_fractions(shares)
        columns = tuple(self.caption_column or ())
        if self.quoting is not None:
            choice("--quoting", self.quoting, ("csv", "none"))
        # The type of the field is a Literal, which an option is not.
        quoting: Any = self.quoting
        return OpenSpec(
            root=self.root,
            image_column=self.image_column,
            # One name may hold wildcards; a tuple is a list of names.
            caption_column=columns[0] if len(columns) == 1 else columns or None,
            caption_template=self.caption_template,
            label_column=self.label_column,
            key_column=self.key_column,
            separator=self.separator,
            quoting=quoting,
            allow_root=tuple(self.allow_root or ()),
            image_ext=self.image_ext,
            caption_ext=self.caption_ext,
            caption_lines=self.caption_lines,
            scale=parse_scale(self.scale),
            max_pixels=self.max_pixels,
            split_column=self.split_column,
            split_file=self.split_file,
            split_fraction=fractions,
            split_seed=split_seed,
            restval=not self.no_restval,
            require=require,
        )


@dataclass(frozen=True, kw_only=True)
class SplitSourceOptions(SourceOptions):
    """Hold the same options for commands in which `--split` has no other meaning."""

    split_column: Annotated[
        str | None,
        _source_option("--split", "--split-column", metavar="NAME", help=SPLIT_COLUMN_HELP),
    ] = None


def split_seed_of(text: str) -> tuple[str, int]:
    """Take `seed=N` out of the shares of `--split-fraction`.

    Returns:
        The shares without it, and the seed; 0 if it is not given.

    Raises:
        OptionError: The seed is not a whole number.
    """
    from apecache.errors import OptionError

    shares = []
    seed = "0"
    n_seeds = 0
    for entry in text.split(","):
        name, _, value = entry.partition("=")
        # A second seed stays among the shares, which then do not add to 1.
        if name.strip() == "seed" and not n_seeds:
            seed = value.strip()
            n_seeds += 1
        else:
            shares.append(entry)
    if not seed.isdecimal():
        raise OptionError(
            f"--split-fraction {text}: expected a whole number as seed, like train=.9,val=.1,seed=3"
        )
    return ",".join(shares), int(seed)
