"""Check the names of further columns: one value for each image, beside split and label."""

from urllib.parse import quote

from apecache.arguments import as_texts
from apecache.data.spec import OpenSpec
from apecache.errors import OptionError

RESERVED = ("key", "split", "label", "content", "caption", "language")
"""Names that `--by`, `--where` and the rows of an index give a meaning of their own."""
LONGEST_NAME = 200
"""Characters of a percent-encoded name: in a store it is part of a folder's name."""


def requested_columns(spec: OpenSpec) -> tuple[str, ...]:
    """Return the names of the further columns, each once.

    Raises:
        OptionError: They are not texts.
    """
    given = spec.columns
    names = (given,) if isinstance(given, str) else as_texts(given, "columns")
    return tuple(dict.fromkeys(names))


def require_column_names(spec: OpenSpec) -> None:
    """Check the names of the further columns.

    Raises:
        OptionError: A name has another meaning already, cannot be printed, or is too long.
    """
    for name in requested_columns(spec):
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
                f"--column {name[:20]}…: its name is too long to be that of a folder in the store; "
                "rename the column in the table"
            )
