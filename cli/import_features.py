"""`apecache import`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from apecache.errors import counted

from .option_groups import (
    ADVANCED,
    STORE_PANEL,
    Device,
    Json,
    MaxBad,
    OptionGroup,
    SingleWriter,
    takes_groups,
)
from .source_options import SplitSourceOptions
from .terminal import choice, ending, printable, progress, show_json, show_table, warn

if TYPE_CHECKING:
    from apecache.data.pairs import PairSource
    from apecache.encoders.spec import EncoderSpec
    from apecache.fingerprint import Modality
    from apecache.store.import_features import ImportReport
    from apecache.store.import_spec import FeatureInput, ImportSpec

ONE_SIDE = "One side"
IMAGE_SIDE = "Images"
TEXT_SIDE = "Texts"
JOIN = "Joining rows"
FEATURES_HELP = (
    ".npy, .npz, .safetensors, .pt, .h5, .parquet or .arrow; a folder, or a pattern like "
    "'part_*.npy'"
)
ENCODER_HELP = "Encoder that made them, e.g. hf:ID, so that queries can be encoded live."
FIELD_HELP = "Array or column in the file. Default: the only one, or one with a usual name."
NAME_HELP = "Name of the features in the store. Default: the encoder's, the array's or the file's."
VIEWS_HELP = "The second dimension counts views, not tokens."


def _side_option(*flags: str, metavar: str, help: str, panel: str) -> Any:
    return typer.Option(*flags, metavar=metavar, help=help, rich_help_panel=panel)


@dataclass(frozen=True, kw_only=True)
class OneSideOptions(OptionGroup):
    """Hold what is said about a source of one side."""

    modality: Annotated[
        str | None,
        _side_option(
            "--modality",
            metavar="SIDE",
            help="Side of SOURCE, if it has one side only: image or text. Any kind of data can be "
            "a side, e.g. audio as image.",
            panel=ONE_SIDE,
        ),
    ] = None
    name: Annotated[
        str | None,
        _side_option("--name", metavar="NAME", help=NAME_HELP, panel=ONE_SIDE),
    ] = None
    encoder: Annotated[
        str | None,
        _side_option("--encoder", metavar="ENCODER", help=ENCODER_HELP, panel=ONE_SIDE),
    ] = None
    field: Annotated[
        str | None,
        _side_option("--field", metavar="FIELD", help=FIELD_HELP, panel=ONE_SIDE),
    ] = None
    keys: Annotated[
        str | None,
        _side_option(
            "--keys",
            metavar="FILE",
            help="Keys of the rows, one a line. Default: those in the file or beside it.",
            panel=ONE_SIDE,
        ),
    ] = None
    views: Annotated[
        bool,
        typer.Option("--views", help=VIEWS_HELP, rich_help_panel=ONE_SIDE),
    ] = False


@dataclass(frozen=True, kw_only=True)
class BothSidesOptions(OptionGroup):
    """Hold the features of each side, and what is said about them."""

    image: Annotated[
        str | None,
        _side_option(
            "--image",
            metavar="FEATURES",
            help=f"Features of the images: {FEATURES_HELP}.",
            panel=IMAGE_SIDE,
        ),
    ] = None
    image_name: Annotated[
        str | None,
        _side_option("--image-name", metavar="NAME", help=NAME_HELP, panel=IMAGE_SIDE),
    ] = None
    image_encoder: Annotated[
        str | None,
        _side_option("--image-encoder", metavar="ENCODER", help=ENCODER_HELP, panel=IMAGE_SIDE),
    ] = None
    image_field: Annotated[
        str | None,
        _side_option("--image-field", metavar="FIELD", help=FIELD_HELP, panel=IMAGE_SIDE),
    ] = None
    image_keys: Annotated[
        str | None,
        _side_option(
            "--image-keys",
            metavar="FILE",
            help="Keys of the images, one a line. Default: those in the file or beside it.",
            panel=IMAGE_SIDE,
        ),
    ] = None
    image_views: Annotated[
        bool,
        typer.Option("--image-views", help=VIEWS_HELP, rich_help_panel=IMAGE_SIDE),
    ] = False
    text: Annotated[
        str | None,
        _side_option(
            "--text",
            metavar="FEATURES",
            help="Features of the texts, in the same forms.",
            panel=TEXT_SIDE,
        ),
    ] = None
    text_name: Annotated[
        str | None,
        _side_option("--text-name", metavar="NAME", help=NAME_HELP, panel=TEXT_SIDE),
    ] = None
    text_encoder: Annotated[
        str | None,
        _side_option("--text-encoder", metavar="ENCODER", help=ENCODER_HELP, panel=TEXT_SIDE),
    ] = None
    text_field: Annotated[
        str | None,
        _side_option("--text-field", metavar="FIELD", help=FIELD_HELP, panel=TEXT_SIDE),
    ] = None
    text_keys: Annotated[
        str | None,
        _side_option(
            "--text-keys",
            metavar="FILE",
            help="Key of each text's image, one a line. Default: those in the file or beside it.",
            panel=TEXT_SIDE,
        ),
    ] = None
    text_views: Annotated[
        bool,
        typer.Option("--text-views", help=VIEWS_HELP, rich_help_panel=TEXT_SIDE),
    ] = False


@dataclass(frozen=True, kw_only=True)
class JoinOptions(OptionGroup):
    """Hold how rows of features find their images and texts."""

    pairs: Annotated[
        str | None,
        typer.Option(
            "--pairs",
            metavar="TABLE",
            help="Images, captions, splits and labels: a source as extract takes it. Default: the "
            "table of STORE if it exists, else what the features come with.",
            rich_help_panel=JOIN,
        ),
    ] = None
    by_row: Annotated[
        bool,
        typer.Option(
            "--by-row",
            help="Join rows by their position where there are no keys. Counts must be equal.",
            rich_help_panel=JOIN,
        ),
    ] = False
    match_keys: Annotated[
        str,
        typer.Option(
            "--match-keys",
            metavar="HOW",
            help="Compare keys exact, by file name (name), or by file name without ending (stem).",
            rich_help_panel=JOIN,
        ),
    ] = "exact"
    image_rows: Annotated[
        str | None,
        typer.Option(
            "--image-rows",
            metavar="FILE",
            help="The row of each text's image, counted from 0: a .npy, or one number a line.",
            rich_help_panel=JOIN,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImportWriteOptions(OptionGroup):
    """Hold how features are stored."""

    storage: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of the stored features: float16, float32 or int8. Default: float16 stays, "
            "others become float32.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = None
    recheck: Annotated[
        bool,
        typer.Option(
            "--recheck",
            help="Compare all committed rows with the source, and write damaged shards again.",
            rich_help_panel=STORE_PANEL,
        ),
    ] = False
    shard_rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rows per commit. Default: about 8 MiB.",
            rich_help_panel=ADVANCED,
        ),
    ] = None
    max_bad: MaxBad = 0.01
    single_writer: SingleWriter = False


@takes_groups
def import_features(
    store: Annotated[
        str,
        typer.Option(
            metavar="STORE",
            help="Feature store to create or to add to: a folder, s3://…, gs://… or az://….",
        ),
    ],
    one_side: OneSideOptions,
    both_sides: BothSidesOptions,
    join: JoinOptions,
    source_options: SplitSourceOptions,
    write: ImportWriteOptions,
    source: Annotated[
        str | None,
        typer.Argument(
            help="Features of both sides (a clip-retrieval folder, an export of apecache, a file "
            "with arrays image and text), or of one side with --modality."
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Make a store of features that exist already.

    Rows are joined with images and captions by key. Interrupt at any time; run the same command to
    resume. Nothing is unpickled.

    Example: apecache import laion/ --store store

    Example: apecache import --image img.npy --text txt.npy --pairs pairs.tsv --by-row --store store
    """
    with ending():
        from apecache.data.sources import open_pairs
        from apecache.store.import_features import import_features as run_import

        choice("--match-keys", join.match_keys, ("exact", "name", "stem"))
        if write.storage is not None:
            choice("--storage", write.storage, ("float16", "float32", "int8"))
        spec = import_spec(
            source,
            one_side=one_side,
            both_sides=both_sides,
            join=join,
            source_options=source_options,
            write=write,
            device=device,
        )
        pairs: PairSource | None = None
        if join.pairs is not None:
            pairs = open_pairs(join.pairs, source_options.spec())
        # The bar is on standard error, so that --json leaves one object on standard output.
        with progress() as update:
            report = run_import(store, spec=spec, pairs=pairs, progress=update)
        show_imported(report, json)


def import_spec(
    source: str | None,
    one_side: OneSideOptions,
    both_sides: BothSidesOptions,
    join: JoinOptions,
    source_options: SplitSourceOptions,
    write: ImportWriteOptions,
    device: str,
) -> "ImportSpec":
    """Return the settings of an import."""
    from apecache.store.import_spec import ImportSpec

    one_sided = _side_of_source(source, one_side)
    image = _input(source, "image", one_side, both_sides)
    text = _input(source, "text", one_side, both_sides)
    # `choice` has checked them; the types of the fields are Literals, which options are not.
    match_keys: Any = join.match_keys
    storage_dtype: Any = write.storage
    return ImportSpec(
        source=None if one_sided else source,
        image=image,
        text=text,
        image_rows=join.image_rows,
        by_row=join.by_row,
        match_keys=match_keys,
        storage_dtype=storage_dtype,
        splits=source_options.spec(),
        max_bad=write.max_bad,
        shard_rows=write.shard_rows,
        device=device,
        recheck=write.recheck,
        single_writer=write.single_writer,
    )


def _side_of_source(source: str | None, side_options: OneSideOptions) -> str | None:
    """Return the side of a source that has one only; None for a source of both, or none.

    Raises:
        OptionError: Options of one side without a side, or an unknown side.
    """
    from apecache.errors import OptionError

    options = (
        side_options.name,
        side_options.encoder,
        side_options.field,
        side_options.keys,
        side_options.views or None,
    )
    # Options of one side mean nothing until it is said which side that is.
    if side_options.modality is None:
        if any(option is not None for option in options):
            raise OptionError(
                "--name, --encoder, --field, --keys and --views are about SOURCE with --modality; "
                "for --image and --text give --image-name, --text-name and so on"
            )
        return None
    choice("--modality", side_options.modality, ("image", "text"))
    if source is None:
        raise OptionError("--modality is the side of SOURCE; give SOURCE, or --image and --text")
    return side_options.modality


def _input(
    source: str | None,
    side: "Modality",
    one_side: OneSideOptions,
    both_sides: BothSidesOptions,
) -> "FeatureInput | None":
    """Return the features of a side: those of `--image` or `--text`, or a source of that side.

    Raises:
        OptionError: Options of a side without its features, or two sources of one side.
    """
    from apecache.errors import OptionError
    from apecache.store.import_spec import FeatureInput

    features: str | None = getattr(both_sides, side)
    names = ("name", "encoder", "field", "keys", "views")
    options = {name: getattr(both_sides, f"{side}_{name}") for name in names}
    if one_side.modality == side:
        if features is not None:
            raise OptionError(f"SOURCE and --{side} are both features of {side}s; give one of them")
        features = source
        options = {name: getattr(one_side, name) or options[name] for name in names}
    if features is None:
        # An option that has no effect is refused: the user expects one.
        unused = [f"--{side}-{name}" for name, value in options.items() if value]
        if unused:
            raise OptionError(f"{unused[0]} is about the features of --{side}; give them too")
        return None
    return FeatureInput(
        features=features,
        field=options["field"],
        keys=options["keys"],
        name=options["name"],
        encoder=_encoder(options["encoder"], side),
        views=options["views"],
    )


def _encoder(text: str | None, side: "Modality") -> "EncoderSpec | None":
    from apecache.encoders.spec import parse_encoder

    return None if text is None else parse_encoder(text, side)


def show_imported(report: "ImportReport", json: bool) -> None:
    """Show what an import did, what it left out, and what is needed for live queries."""
    for array in report.arrays:
        for example in array.examples:
            warn(f"{array.modality} {example}")
    for reason, count in report.left_out.items():
        warn(f"{count:,} {reason}")
    if not report.has_captions and report.n_texts:
        warn("captions are not known: texts are named by their rows; give them with --pairs")
    if json:
        arrays = [vars(array) for array in report.arrays]
        show_json({**vars(report), "arrays": arrays, "nothing_to_do": report.nothing_to_do})
        return
    columns = ("modality", "features", "rows", "dim", "dtype", "imported now", "no features")
    rows: list[tuple[object, ...]] = []
    for array in report.arrays:
        rows.append(
            (
                array.modality,
                array.name,
                array.rows,
                array.dim,
                array.dtype,
                array.n_imported,
                array.n_quarantined,
            )
        )
    if report.nothing_to_do:
        typer.echo(f"nothing to do: {report.store} is complete")
        return
    show_table(str(report.store), columns, rows)
    n_rows = sum(array.n_imported for array in report.arrays)
    typer.echo(
        f"{counted(n_rows, 'row')} imported in {report.seconds:.1f} s; "
        f"{counted(report.n_images, 'image')}, {counted(report.n_texts, 'text')}"
    )
    for array in report.arrays:
        typer.echo(printable(encoder_line(array)))


def encoder_line(array: Any) -> str:
    """Say whether new inputs can be encoded for the features of an array."""
    label = f"{array.modality}/{array.name}"
    if array.encoder is None:
        return (
            f"{label}: no encoder named, so evaluation, index and search --key work, and live "
            f"queries do not; for those name it with --{array.modality}-encoder"
        )
    if array.n_compared:
        return f"{label}: {counted(array.n_compared, 'row')} encoded again by {array.encoder} agree"
    return f"{label}: {array.encoder}, not compared with any row (no input could be read)"
