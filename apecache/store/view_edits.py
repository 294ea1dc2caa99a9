"""Make a new view of a store from its newest one: with other splits, or without some rows."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath
from apecache.data.recorded import recorded_column
from apecache.data.spec import OpenSpec
from apecache.data.splits import require_fractions, split_of
from apecache.errors import DataError
from apecache.fingerprint import Modality, content_hash, digest_strings
from apecache.storage.files import Files
from apecache.storage.open import as_files
from apecache.store.layout import SEGMENTS
from apecache.store.near_duplicates import near_images
from apecache.store.reader import FeatureStore, segment_names
from apecache.store.table import PairTable, with_columns
from apecache.store.views import (
    BlockReference,
    View,
    ViewRecord,
    commit_view,
    draft_view,
    view_ids,
)

GROUPINGS = ("content", "key", "label")
"""What images of one split have in common with no image of another; or a column of the table."""
COLUMN_RULE = "column:"
"""Begins the grouping of a rule that groups by a column; the quoted name of the column follows."""
NEAR_RULE = "~"
"""Stands between a grouping and the cosine of near duplicates."""


def first_view(files: Files) -> View:
    """Return the view of a store without views: the table of its blocks."""
    store = FeatureStore.at(files)
    pairs = store.pairs
    blocks: list[BlockReference] = []
    for name, block in zip(["", *segment_names(files)], store.blocks, strict=False):
        source = block.block_source
        blocks.append(
            BlockReference(
                folder=f"{SEGMENTS}/{name}" if name else "",
                digest=source["digest"],
                n_images=source["n_images"],
                n_texts=source["n_texts"],
            )
        )
    rows: dict[Modality, NDArray[np.int64]] = {
        "image": np.arange(len(pairs.keys)),
        "text": np.arange(len(pairs.captions)),
    }
    record = ViewRecord(
        view="",
        name="",
        parent="",
        digest=store.digest,
        table=store.digest,
        n_images=len(pairs.keys),
        n_texts=len(pairs.captions),
        origin=store.source["origin"],
        root=store.source["root"],
        options=dict(store.source.get("options", {})),
        blocks=tuple(blocks),
        objects={},
    )
    return draft_view(pairs, rows, [""] * len(pairs.keys), record)


def newest_view(files: Files) -> View:
    """Return the newest view; the table of the blocks becomes a view first, if there is none."""
    if not view_ids(files):
        commit_view(files, first_view(files), number=0)
    view = FeatureStore.at(files).view
    assert view is not None
    return view


def split_rule(
    fractions: Sequence[tuple[str, float]],
    by: str,
    seed: int,
    near: float | None = None,
) -> str:
    """Return how splits are chosen, as a view records it."""
    shares = ",".join(f"{name}={share:g}" for name, share in fractions)
    # `quote` leaves `~` as it is.
    quoted = quote(by, safe="").replace(NEAR_RULE, "%7E")
    grouping = by if by in GROUPINGS else f"{COLUMN_RULE}{quoted}"
    suffix = "" if near is None else f"{NEAR_RULE}{near:g}"
    return f"{grouping}{suffix};{seed};{shares}"


def parse_rule(rule: str) -> tuple[tuple[tuple[str, float], ...], str, int]:
    """Parse what `split_rule` returns, without the cosine of near duplicates."""
    grouping, seed, shares = rule.split(";", 2)
    by = grouping.partition(NEAR_RULE)[0]
    if by.startswith(COLUMN_RULE):
        by = unquote(by.removeprefix(COLUMN_RULE))
    fractions: list[tuple[str, float]] = []
    for split_share in shares.split(","):
        name, _, share = split_share.rpartition("=")
        fractions.append((name, float(share)))
    return tuple(fractions), by, int(seed)


def split_store(
    store: Files | AnyPath,
    fractions: Sequence[tuple[str, float]] | Mapping[str, float],
    by: str = "content",
    seed: int = 0,
    near: float | None = None,
    features: str | None = None,
    source: AnyPath | None = None,
) -> ViewRecord:
    """Divide the images of the newest view into splits, as a new view.

    A hash of each group and the seed chooses its split, so images that are added later move no
    other image. Images of equal content are always in one split.

    Args:
        store: The store: a folder, or a URL of object storage.
        fractions: Share of each split, `{"train": 0.9, "val": 0.1}` or pairs. They sum to 1.
        by: What makes a group: `content` (the bytes of an image), `key`, `label`, or a column of
            the table that the store was made of. Images without a value there are groups of their
            own.
        seed: Another seed gives other splits.
        near: Images whose cosine is at least this, and all that are connected in this way, are in
            one group. None: only images of equal content are.
        features: Name of the features that `near` compares; None for the first pooled ones.
        source: The table, where it is not where the store recorded it.

    Raises:
        StoreError: There is not a store.
        OptionError: Fractions or `near` are wrong.
        ManifestError: The table has no such column, or is not there.
        DataError: Images are grouped by label, and have none; or there are no features to compare.
    """
    shares = tuple(fractions.items() if isinstance(fractions, Mapping) else fractions)
    require_fractions(shares)
    files = as_files(store)
    opened = FeatureStore.at(files)
    # Read before anything is written: a wrong column leaves the store as it is.
    groups = image_groups(
        opened,
        by,
        values={} if by in GROUPINGS else column_values(opened, by, source),
        near=() if near is None else near_images(opened, near, features),
    )
    view = newest_view(files)
    splits = splits_of_groups(groups, shares, seed)
    table = with_columns(view.table, splits=np.array(splits, dtype=object))
    return edited_view(files, view, table, splits=split_rule(shares, by, seed, near))


def column_values(
    store: FeatureStore,
    column: str,
    source: AnyPath | None = None,
    option: str = "--by",
) -> dict[str, str]:
    """Return a further column of the view; of the table that it was made of, if it holds none.

    Args:
        store: The store, opened at a view.
        column: Name of the column.
        source: The table; its column is read even where the view holds one.
        option: What asked for the column, for messages.

    Returns:
        Value by key of the image; empty where there is none.

    Raises:
        ManifestError: The table cannot be opened, has no such column, or several values for one
            image.
    """
    if source is None and column in store.pairs.columns:
        return store.pairs.value_of_key(column)
    return recorded_column(store.source, column, source, option)


def splits_of_groups(
    groups: Iterable[str],
    fractions: Sequence[tuple[str, float]],
    seed: int,
) -> list[str]:
    """Return the split of each group."""
    spec = OpenSpec(split_fraction=tuple(fractions), split_seed=seed)
    return [split_of(group, spec) for group in groups]


def image_groups(
    store: FeatureStore,
    by: str,
    values: Mapping[str, str] | None = None,
    near: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """Return the name of each image's group; groups that share a content are one.

    Args:
        store: The store.
        by: As `split_store` takes it.
        values: Value by key of the column that is not a grouping of the store itself.
        near: Pairs of images that belong to one group.

    Raises:
        DataError: Images are grouped by label, and have none.
    """
    values = values or {}
    pairs = store.pairs
    contents = image_contents(store)
    own_names = [content or str(key) for key, content in zip(pairs.keys, contents, strict=True)]
    match by:
        case "key":
            names = [str(key) for key in pairs.keys]
        case "label":
            names = [str(label) for label in pairs.labels]
            if not all(names):
                raise DataError(f"{store.path}: images without a label; give --by content")
        case "content":
            names = own_names
        case _:
            names = [
                values.get(str(key), "") or own_name
                for key, own_name in zip(pairs.keys, own_names, strict=True)
            ]
    return joined_groups(names, contents, near)


def image_contents(store: FeatureStore) -> list[str]:
    """Return the hash of each image; empty where no features of images say it."""
    arrays = store.arrays("image")
    return arrays[0].content() if arrays else [""] * len(store.pairs.keys)


def joined_groups(
    names: Sequence[str],
    contents: Sequence[str],
    near: Sequence[tuple[int, int]] = (),
) -> list[str]:
    """Join groups that share a content; each is called by the least of its names.

    Args:
        names: Group of each image.
        contents: Content of each image; empty where it is not known.
        near: Rows of images whose groups are joined as well.
    """
    parents: dict[str, str] = {}

    # Union-find: chains of shared contents join groups that share no content themselves.
    def root(name: str) -> str:
        while parents.setdefault(name, name) != name:
            # Each walk halves the path, so that long chains stay cheap.
            parents[name] = parents[parents[name]]
            name = parents[name]
        return name

    def join(one: str, other: str) -> None:
        # The least name wins whatever the order of rows, so a split does not depend on it.
        least, later = sorted((root(one), root(other)))
        parents[later] = least

    first_name: dict[str, str] = {}
    for name, content in zip(names, contents, strict=True):
        if content:
            join(name, first_name.setdefault(content, name))
    for first, second in near:
        join(names[first], names[second])
    return [root(name) for name in names]


def delete_rows(files: Files, keep: Callable[[PairTable], NDArray[np.bool_]]) -> ViewRecord:
    """Leave images, with their captions, out of the newest view, as a new view.

    Args:
        files: The store.
        keep: Returns bool [n_images], False for images to leave out.

    Raises:
        DataError: No image is left out, or all are.
    """
    view = newest_view(files)
    table = view.table
    kept_images = keep(table)
    n_deleted = int((~kept_images).sum())
    # A view without a change would only hide a wrong condition.
    if n_deleted in (0, len(kept_images)):
        raise DataError(
            f"{files.place}: {n_deleted} of {len(kept_images)} images would be deleted; "
            "expected at least one, and not all"
        )
    texts = kept_images[table.image_rows]
    # A kept row moves up by the number of rows that were deleted before it.
    new_row = np.cumsum(kept_images) - 1
    new_table = PairTable(
        keys=table.keys[kept_images],
        splits=table.splits[kept_images],
        labels=table.labels[kept_images],
        captions=table.captions[texts],
        languages=table.languages[texts],
        image_rows=new_row[table.image_rows[texts]],
        digest="",
        columns={name: values[kept_images] for name, values in table.columns.items()},
    )
    rows: dict[Modality, NDArray[np.int64]] = {
        "image": view.content_rows("image")[kept_images],
        "text": view.content_rows("text")[texts],
    }
    return edited_view(
        files, view, new_table, rows=rows, problems=view.problems[kept_images].tolist()
    )


def edited_view(
    files: Files,
    view: View,
    table: PairTable,
    rows: dict[Modality, NDArray[np.int64]] | None = None,
    problems: Sequence[str] | None = None,
    splits: str | None = None,
) -> ViewRecord:
    """Commit a view with another table.

    Args:
        files: The store.
        view: The view that it is made from.
        table: The new table; its digest is computed here.
        rows: Content rows of the new table; None for those of the view.
        problems: Why its images have no features; None for those of the view.
        splits: How its splits were chosen; None as in the view.
    """
    content_rows = rows or {
        "image": view.content_rows("image"),
        "text": view.content_rows("text"),
    }
    # The digest covers the rows that are read too: equal tables may have other features.
    table_hash = table_digest(table)
    row_hashes = [content_hash(values.tobytes()) for values in content_rows.values()]
    block_digests = [block.digest for block in view.record.blocks]
    digest = digest_strings(
        [table_hash, *block_digests, *row_hashes, *column_digests(table.columns)]
    )
    record = replace(
        view.record,
        view="",
        name="",
        parent=view.record.view,
        digest=digest,
        table=table_hash,
        n_images=len(table.keys),
        n_texts=len(table.captions),
        in_order=(),
        objects={},
        splits=view.record.splits if splits is None else splits,
    )
    described = view.problems.tolist() if problems is None else problems
    draft = draft_view(with_columns(table, digest=digest), content_rows, described, record)
    return commit_view(files, draft)


def column_digests(columns: Mapping[str, NDArray[np.object_]]) -> list[str]:
    """Return what further columns add to the identity of a view; nothing where it has none."""
    return [digest_strings([name, *map(str, values)]) for name, values in sorted(columns.items())]


def table_digest(table: PairTable) -> str:
    """Return the digest of a table, as that of the source it would come from."""
    captions: list[list[str]] = [[] for _ in table.keys]
    languages: list[list[str]] = [[] for _ in table.keys]
    for caption, language, row in zip(
        table.captions,
        table.languages,
        table.image_rows.tolist(),
        strict=True,
    ):
        captions[row].append(str(caption))
        languages[row].append(str(language))
    strings: list[str] = []
    for row, key in enumerate(table.keys):
        # The number of captions keeps two different tables from the same list of strings.
        caption_count = str(len(captions[row]))
        strings += [str(key), str(table.splits[row]), str(table.labels[row]), caption_count]
        strings += [*captions[row], *languages[row]]
    return digest_strings(strings)
