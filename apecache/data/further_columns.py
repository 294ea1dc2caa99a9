"""Read further columns of a source: values of its images that are neither split nor label."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from urllib.parse import quote

from apecache.arguments import as_texts
from apecache.data.pairs import PairSource
from apecache.data.spec import OpenSpec
from apecache.errors import ManifestError, OptionError

RESERVED = ("key", "split", "label", "content", "caption", "language")
"""Names that `--by`, `--where` and the rows of an index give a meaning of their own."""
LONGEST_NAME = 200
"""Characters of a percent-encoded name: in a store it is part of a folder's name."""


def column_names(spec: OpenSpec) -> tuple[str, ...]:
    """Return the names of the further columns, each once.

    Raises:
        OptionError: A name has another meaning already, cannot be printed, or is too long.
    """
    given = spec.columns
    names = (given,) if isinstance(given, str) else as_texts(given, "columns")
    for name in names:
        if name in RESERVED:
            raise OptionError(
                f"--column {name}: conditions give this name a meaning of its own; rename the "
                "column in the table"
            )
        # `=` ends a name in conditions.
        if not name.strip() or not name.isprintable() or "=" in name:
            raise OptionError(
                f"--column {name!r}: expected a name of printable characters without =; rename the "
                "column in the table"
            )
        if len(quote(name, safe="")) > LONGEST_NAME:
            raise OptionError(
                f"--column {name[:20]}…: its name is too long to be that of a folder; rename the "
                "column in the table"
            )
    return tuple(dict.fromkeys(names))


def read_column(
    spec: OpenSpec,
    name: str,
    opened: Callable[[OpenSpec], PairSource],
    option: str = "--column",
) -> dict[str, str]:
    """Read one column of a source, as its labels are read.

    Args:
        spec: How the source is opened.
        name: Name of the column.
        opened: Opens the source.
        option: What asked for the column, for messages.

    Returns:
        Value by key of the image; empty where the source has none.

    Raises:
        ManifestError: The source cannot be opened, has no such column, or several values for one
            image.
        OptionError: This kind of source has no columns.
    """
    try:
        source = opened(replace(spec, label_column=name))
    except (ManifestError, OptionError) as error:
        # The column was read in the place of the labels.
        message = str(error).replace("--label-column", f"{option} {name}")
        message = message.replace(" has label ", f" has {name} ")
        message = message.replace("give one label per", f"give one {name} per")
        message = message.replace(": label is a ", f": {name} is a ")
        if isinstance(error, OptionError):
            raise OptionError(message) from None
        raise ManifestError(message) from None
    return {pair.key: pair.label for pair in source}


def with_further_columns(
    source: PairSource,
    spec: OpenSpec,
    opened: Callable[[OpenSpec], PairSource],
) -> PairSource:
    """Return a source with the further columns of the spec; raises as `read_column` does."""
    columns: dict[str, Mapping[str, str]] = {}
    for name in column_names(spec):
        columns[name] = read_column(spec, name, opened)
    return replace(source, columns=columns) if columns else source
