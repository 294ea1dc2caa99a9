"""Keep further columns of a table in its view, and those of the newest view if none are named."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from apecache.data.pairs import PairSource
from apecache.data.recorded import options_to_record, recorded_column
from apecache.errors import ManifestError
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable, string_column


def keep_columns(source: PairSource, newest: FeatureStore | None) -> PairSource:
    """Give a table without further columns those of the newest view.

    Their values come from the table, where it has the column; else from the view, and images that
    are new to it have none.

    Args:
        source: The table.
        newest: The newest view.
    """
    if source.columns or newest is None or not newest.pairs.columns:
        return source
    return with_columns_of(source, names=newest.pairs.columns, known=further_columns(newest.pairs))


def with_columns_of(
    source: PairSource,
    names: Iterable[str],
    known: Mapping[str, Mapping[str, str]],
) -> PairSource:
    """Return a source with further columns, for which its table is read again.

    Args:
        source: The source.
        names: Names of the columns.
        known: Values of columns that the source lacks. A column that is in neither is left out.

    Raises:
        ManifestError: The source has a column, and it cannot be read.
    """
    record = {"origin": source.origin, "options": options_to_record(source)}
    columns = dict(source.columns)
    for name in names:
        if name in columns:
            continue
        if name not in source.fields.columns:
            if name in known:
                columns[name] = known[name]
            continue
        try:
            columns[name] = recorded_column(record, name)
        except ManifestError as error:
            # Old values would be mixed with a new table.
            raise ManifestError(
                f"the newest view keeps column {name!r}, which is read again: {error}; or name "
                "the columns to keep with --column (in Python, OpenSpec(columns=…))"
            ) from None
    options = {**source.options, "columns": list(columns)}
    return replace(source, columns=columns, options=options)


def further_columns(table: PairTable) -> dict[str, dict[str, str]]:
    """Return the further columns of a table: value by name of the column and key of the image."""
    return {name: table.value_of_key(name) for name in table.columns}


def source_columns(source: PairSource) -> dict[str, NDArray[np.object_]]:
    """Return the further columns of a source as a view has them, each [n_images]."""
    return {
        name: string_column(values.get(key, "") for key in source.keys)
        for name, values in source.columns.items()
    }


def has_columns(table: PairTable, columns: Mapping[str, NDArray[np.object_]]) -> bool:
    """Return whether these are the further columns of a table, in any order."""
    return table.columns.keys() == columns.keys() and all(
        np.array_equal(table.columns[name], values) for name, values in columns.items()
    )
