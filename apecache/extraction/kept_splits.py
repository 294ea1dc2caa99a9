"""Keep the splits that `apecache split` chose when a table without splits is extracted again."""

from collections.abc import Mapping
from dataclasses import replace

from apecache.data.pairs import PairSource
from apecache.data.recorded import options_to_record, recorded_column
from apecache.errors import DataError, ManifestError, OptionError
from apecache.extraction.contents import SEEN, TableContents
from apecache.extraction.matching import Rows
from apecache.store.reader import FeatureStore
from apecache.store.view_edits import GROUPINGS, parse_rule, splits_of_groups


def keep_splits(
    source: PairSource,
    newest: FeatureStore | None,
    rows: Rows,
    contents: TableContents,
) -> tuple[PairSource, str]:
    """Give a table without splits those of the newest view; new images are split by its rule.

    Args:
        source: The table.
        newest: The newest view.
        rows: Where the features of the table's rows lie.
        contents: What its images are.

    Returns:
        The table, and how its splits were chosen; empty where they are its own.
    """
    rule = "" if newest is None or newest.view is None else newest.view.record.splits
    if newest is None or newest.view is None or not rule or any(pair.split for pair in source):
        return source, ""
    fractions, by, seed = parse_rule(rule)
    values: Mapping[str, str] = {} if by in GROUPINGS else _column_values(source, by)
    pairs = newest.pairs
    split_of_key = dict(zip(map(str, pairs.keys), map(str, pairs.splits), strict=True))
    split_of_row: dict[int, str] = {}
    groups: list[str] = []
    for row, pair in enumerate(source):
        content = contents.contents[row]
        is_known = content is not None and content not in ("", SEEN)
        by_content = str(content) if is_known else pair.key
        by_column = values.get(pair.key, "") or by_content
        groups.append({"key": pair.key, "label": pair.label}.get(by, by_column))
        if pair.key in split_of_key and int(rows.images[row]) != -1:
            split_of_row.setdefault(int(rows.images[row]), split_of_key[pair.key])
    new_splits = splits_of_groups(groups, fractions, seed)
    new_pairs = []
    for row, pair in enumerate(source):
        content_row = int(rows.images[row])
        split = split_of_key.get(pair.key) or new_splits[row]
        # Equal contents have one content row, and so one split.
        if content_row != -1:
            split = split_of_row.setdefault(content_row, split)
        new_pairs.append(replace(pair, split=split))
    return replace(source, pairs=tuple(new_pairs)), rule


def _column_values(source: PairSource, column: str) -> Mapping[str, str]:
    """Return the column that splits were chosen by.

    Raises:
        DataError: The table cannot be read again, or has the column no more.
    """
    if column in source.columns:
        return source.columns[column]
    record = {"origin": source.origin, "options": options_to_record(source)}
    try:
        return recorded_column(record, column)
    except (ManifestError, OptionError) as error:
        raise DataError(
            f"the splits of the store keep equal values of column {column!r} together, and it "
            f"cannot be read ({error}); give the table a column `split`"
        ) from None
