"""Read columns of a store's table that an index keeps, for conditions such as `color=red`."""

import re
from collections.abc import Mapping, Sequence

from apecache.arguments import AnyPath
from apecache.data.further_columns import RESERVED
from apecache.errors import OptionError
from apecache.store.reader import FeatureStore
from apecache.store.view_edits import column_values

NAME = re.compile(r"\w+")
ColumnValues = Mapping[str, Mapping[str, str]]
"""Value of each image by column and key."""


def read_columns(
    store: FeatureStore,
    columns: Sequence[str],
    source: AnyPath | None = None,
) -> dict[str, dict[str, str]]:
    """Read columns of the table that a store was made of.

    Args:
        store: The store, which recorded where its table is.
        columns: Names of the columns.
        source: The table, where it is not where the store recorded it.

    Returns:
        Value by column and key of the image; empty where the table has none.

    Raises:
        OptionError: A name is no word, or that of a field which every row has.
        ManifestError: The table is not there, or has no such column.
    """
    for column in columns:
        if not NAME.fullmatch(column):
            raise OptionError(
                f"--column {column!r}: expected letters, digits and _, as --where takes them; "
                "rename the column in the table"
            )
        if column in RESERVED:
            raise OptionError(f"--column {column}: every row has it already; leave it out")
    return {
        column: column_values(store, column, source, option="--column")
        for column in dict.fromkeys(columns)
    }
