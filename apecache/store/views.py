"""Write, find and read views: tables whose rows say where their features lie.

A view is immutable. Its objects are written first, then its record, put if absent: this is its
commit. A copy of the record comes last, beside the objects, so that a lost record is noticed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apecache.errors import DamagedError, OptionError, StoreError, nearest, one_line
from apecache.fingerprint import Json, Modality, content_hash
from apecache.storage.files import Files
from apecache.store.layout import (
    PAIRS,
    SEGMENTS,
    VIEW_COLUMNS,
    VIEW_RECORDS,
    VIEWS,
    table_objects,
    view_folder,
    view_record_name,
)
from apecache.store.records import read_record, seal_record
from apecache.store.table import (
    LazyPairTable,
    PairTable,
    checked_image_rows,
    read_column,
    stored_name,
)

VIEW_ID = re.compile(r"[0-9]{4,9}-[0-9a-f]{8}")
VIEW_NUMBER = re.compile(r"[0-9]+(-.*)?")
BLOCK_FOLDER = re.compile(rf"(?:{SEGMENTS}/[0-9]{{4,9}})?")
COPY = "view.json"
DIMENSIONS: dict[str, Modality] = {"image": "image", "text": "text"}


@dataclass(frozen=True, kw_only=True)
class BlockReference:
    """Name a block of content rows."""

    folder: str
    """Folder below the store; empty for the store itself."""
    digest: str
    """Digest of the block's own table."""
    n_images: int
    n_texts: int

    def rows(self, modality: Modality) -> int:
        return self.n_images if modality == "image" else self.n_texts


@dataclass(frozen=True, kw_only=True)
class ViewRecord:
    """Hold what a view is, without its columns."""

    view: str
    """Its id: number and hash; empty before it is committed."""
    name: str
    """Name that the user gave; may be empty."""
    parent: str
    """Id of the newest view when it was made; empty for the first."""
    digest: str
    """Identity of the table and of what its rows point to."""
    table: str
    """Digest of the table alone."""
    n_images: int
    n_texts: int
    origin: str
    """How the user named the table."""
    root: str
    """Where its images were."""
    blocks: tuple[BlockReference, ...]
    """Blocks whose rows its rows are, in order."""
    in_order: tuple[Modality, ...] = ()
    """Modalities whose rows are exactly those of the blocks, in order."""
    splits: str = ""
    """How `apecache split` chose the splits; empty where the table has them."""
    options: Mapping[str, Json] = field(default_factory=dict)
    """How the source was opened, so that its images can be read again."""
    columns: tuple[str, ...] = ()
    """Further columns of the table that the view holds."""
    objects: Mapping[str, Mapping[str, Json]]
    """Size and hash of each object, by name."""

    @property
    def number(self) -> int:
        return int(self.view.partition("-")[0])

    def block_rows(self, modality: Modality) -> int:
        """Count the rows of all blocks."""
        return sum(block.rows(modality) for block in self.blocks)

    def to_json(self) -> dict[str, Json]:
        fields = asdict(self)
        # Left out where it says nothing: other records are the same as without the field.
        if not self.columns:
            del fields["columns"]
        return {**fields, "blocks": [asdict(block) for block in self.blocks]}


@dataclass(frozen=True, kw_only=True)
class View:
    """Read a view; columns are read when they are asked for."""

    record: ViewRecord
    read: Callable[[str], NDArray[Any]]
    """Returns a column by its name."""

    @cached_property
    def table(self) -> PairTable:
        """Return the table; a column is read when it is first asked for.

        Reading a column raises DamagedError if an object of it is not what was written.
        """

        def read(name: str) -> NDArray[Any]:
            column = self.read(name)
            if name == "text_image_row":
                view_name = f"view {self.record.view}"
                return checked_image_rows(column, view_name, 0, self.record.n_images)
            return column

        return LazyPairTable(read, self.record.digest, self.record.columns)

    @cached_property
    def problems(self) -> NDArray[np.object_]:
        """Return why each image has no features, `reason: detail`; empty where it has."""
        return self.read("image_problem")

    def content_rows(self, modality: Modality) -> NDArray[np.int64]:
        """Return the row in the blocks of each row of the table; -1 where it has none."""
        if modality in self.record.in_order:
            return np.arange(self.record.block_rows(modality))
        return self._images if modality == "image" else self._texts

    def index(self, modality: Modality) -> NDArray[np.int64] | None:
        """Return `content_rows`, or None where they are all rows of the blocks in order."""
        return None if modality in self.record.in_order else self.content_rows(modality)

    @cached_property
    def _images(self) -> NDArray[np.int64]:
        return self._checked_rows("image")

    @cached_property
    def _texts(self) -> NDArray[np.int64]:
        return self._checked_rows("text")

    def _checked_rows(self, modality: Modality) -> NDArray[np.int64]:
        rows = np.asarray(self.read(f"{modality}_content_row"), np.int64)
        n_rows = self.record.block_rows(modality)
        if len(rows) and not (rows.min() >= -1 and rows.max() < n_rows):
            raise DamagedError(
                f"view {self.record.view}: rows that its blocks do not have; restore its files"
            )
        return rows


def draft_view(
    table: PairTable,
    content_rows: Mapping[Modality, NDArray[np.int64]],
    problems: Sequence[str],
    record: ViewRecord,
) -> View:
    """Return a view that is not committed yet.

    Args:
        table: Its table.
        content_rows: Rows in the blocks by modality.
        problems: Why each image has no features.
        record: Its record, without id, objects, `in_order` and columns.
    """
    in_order: list[Modality] = []
    for modality, rows in content_rows.items():
        if np.array_equal(rows, np.arange(record.block_rows(modality))):
            in_order.append(modality)
    columns = {
        "image_key": table.keys,
        "image_split": table.splits,
        "image_label": table.labels,
        "text_caption": table.captions,
        "text_language": table.languages,
        "text_image_row": table.image_rows,
        "image_problem": np.array(problems, dtype=object),
        "image_content_row": content_rows["image"],
        "text_content_row": content_rows["text"],
        **{stored_name(name): values for name, values in table.columns.items()},
    }
    record = replace(record, in_order=tuple(in_order), columns=tuple(table.columns))
    return View(record=record, read=columns.__getitem__)


def commit_view(files: Files, view: View, number: int | None = None) -> ViewRecord:
    """Commit a view as the newest one.

    Args:
        files: The store.
        view: What `draft_view` returned, or a view of this store.
        number: Number of its id; None for the next one.

    Returns:
        Its record; that of another writer, if one has committed the same view.

    Raises:
        StoreError: The operating system or the storage refused.
        DamagedError: What was read back differs from what was written.
    """
    payloads = view_payloads(view)
    hashes = {name: content_hash(data) for name, data in payloads.items()}
    identity = "".join(f"{name} {digest} " for name, digest in sorted(hashes.items()))
    suffix = content_hash(f"{identity} {view.record.digest} {view.record.name}")[:8]
    with files.exclusive("records"):
        _require_blocks(files, view.record)
        ids = view_ids(files)
        if number is None and ids and ids[-1].endswith(f"-{suffix}"):
            # Another writer has just committed the same view.
            number = view_number(ids[-1])
        if number is None:
            number = 1 + (view_number(ids[-1]) if ids else 0)
        view_id = f"{number:04d}-{suffix}"
        objects: dict[str, dict[str, Json]] = {}
        for path, data in payloads.items():
            # The id has a hash of all objects, so what is there already has the same bytes.
            name = f"{view_folder(view_id)}{path}"
            files.put_if_absent(name, data)
            if files.digest(name) != hashes[path]:
                raise DamagedError(
                    f"{files.where(name)}: what was read back is not what was written; check "
                    "the disk"
                )
            objects[name] = {"bytes": len(data), "blake3": hashes[path]}
        record = replace(view.record, view=view_id, objects=objects)
        name = view_record_name(view_id)
        files.put_if_absent(name, seal_record(name, record.to_json(), of_view=True))
        settle_view(files, view_id)
    return read_view_record(files, view_id)


def _require_blocks(files: Files, record: ViewRecord) -> None:
    """Raise StoreError unless all blocks of a view are there; they may have been compacted away."""
    for block in record.blocks:
        folder = f"{block.folder}/" if block.folder else ""
        if not files.exists(f"{folder}{PAIRS}"):
            raise StoreError(
                f"{files.where(block.folder)} is gone: the store was compacted meanwhile; run the "
                "same command again"
            )


def view_payloads(view: View) -> dict[str, bytes]:
    """Return the objects of a view by path below its folder, each with a leading `/`."""
    dimensions = column_dimensions(view.record)
    columns = {name: (dimension, view.read(name)) for name, dimension in dimensions.items()}
    blocks: Json = [asdict(block) for block in view.record.blocks]
    return table_objects(columns, "", {"apecache": {"blocks": blocks}})


def column_dimensions(record: ViewRecord) -> dict[str, str]:
    """Return the dimension of each column of a view: those of every view, then its further ones."""
    further = {stored_name(name): "image" for name in record.columns}
    return {**dict(VIEW_COLUMNS), **further}


def settle_view(files: Files, view_id: str) -> None:
    """Make a committed view durable, and write the copy of its record."""
    # Whoever wrote the record may have been killed before its entry was durable.
    files.settle(VIEW_RECORDS)
    data = files.read(view_record_name(view_id))
    files.put_if_absent(f"{view_folder(view_id)}/{COPY}", data)


def view_ids(files: Files) -> list[str]:
    """Return the ids of all committed views, the newest last.

    Raises:
        DamagedError: The record of a view is lost.
    """
    folders = [name for name in files.list(VIEWS) if VIEW_ID.fullmatch(name)]
    recorded = _recorded(files)
    for view_id in sorted(set(folders) - set(recorded)):
        # Looked at again: the view may have been committed just now.
        if files.exists(f"{view_folder(view_id)}/{COPY}") and view_id not in _recorded(files):
            raise DamagedError(
                f"{files.where(view_record_name(view_id))} is missing; write it again with: "
                "apecache repair"
            )
    return sorted(recorded, key=lambda view_id: (view_number(view_id), view_id))


def _recorded(files: Files) -> list[str]:
    names = (name.removesuffix(".json") for name in files.list(VIEW_RECORDS))
    return [name for name in names if VIEW_ID.fullmatch(name)]


def view_number(view_id: str) -> int:
    """Return the number that an id begins with: views are numbered in the order of their making."""
    return int(view_id.partition("-")[0])


def find_view(files: Files, view: str) -> str:
    """Find a view by its id, the number of its id, or its name.

    Raises:
        StoreError: There is no such view, or there are several.
    """
    ids = view_ids(files)
    names = {view_id: read_view_record(files, view_id).name for view_id in ids}
    matches: list[str] = []
    for view_id in ids:
        number = view_id.partition("-")[0]
        if view in (view_id, number, number.lstrip("0"), names[view_id]):
            matches.append(view_id)
    if not matches:
        available = [name or view_id for view_id, name in names.items()]
        raise StoreError(
            f"{files.place} has no view {view!r}; found: {', '.join(available) or 'none'}"
            f"{nearest(view, available)}"
        )
    if len(matches) > 1:
        raise StoreError(f"{files.place} has several views {view!r}: {', '.join(matches)}")
    return matches[0]


def read_view_record(files: Files, view_id: str) -> ViewRecord:
    """Read the record of a view.

    Raises:
        DamagedError: The record is missing, damaged or not in its place.
        StoreError: It has a newer format.
    """
    name = view_record_name(view_id)
    return parse_view(read_record(files, name), view_id, files.where(name))


def parse_view(value: Mapping[str, Any], view_id: str, where: str) -> ViewRecord:
    """Parse a record; raises DamagedError unless it is that of the view."""
    try:
        blocks = tuple(_block(block) for block in value["blocks"])
        in_order = tuple(DIMENSIONS[modality] for modality in value["in_order"])
        texts = {
            key: value[key]
            for key in (
                "view", "name", "parent", "digest", "table", "origin", "root", "splits",
            )
        }  # fmt: skip
        if not all(type(text) is str for text in texts.values()):
            raise ValueError("a text that is none")
        # Views of earlier versions have none.
        options = dict(value.get("options", {}))
        columns = value.get("columns", [])
        if type(columns) is not list or not all(type(name) is str for name in columns):
            raise ValueError("columns that are no list of names")
        record = ViewRecord(
            **texts,
            n_images=_count(value["n_images"]),
            n_texts=_count(value["n_texts"]),
            blocks=blocks,
            in_order=in_order,
            options=options,
            columns=tuple(columns),
            objects=value["objects"],
        )
        if record.view != view_id or not blocks:
            raise ValueError("a record of another view")
        folder = f"{view_folder(view_id)}/"
        if not all(name.startswith(folder) for name in record.objects):
            raise ValueError("objects of another view")
        for modality in in_order:
            n_rows = record.n_images if modality == "image" else record.n_texts
            if record.block_rows(modality) != n_rows:
                raise ValueError("more rows than its blocks have")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{where} is damaged: {one_line(error)}; restore the file") from None
    return record


def _block(value: Mapping[str, Any]) -> BlockReference:
    block = BlockReference(
        folder=value["folder"],
        digest=str(value["digest"]),
        n_images=_count(value["n_images"]),
        n_texts=_count(value["n_texts"]),
    )
    # The folder is a path to open, so nothing else is accepted.
    if not BLOCK_FOLDER.fullmatch(block.folder):
        raise ValueError("a block outside the store")
    return block


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError("a count that is none")
    return value


def open_view(files: Files, view_id: str) -> View:
    """Open a committed view; raises as `read_view_record` does."""
    record = read_view_record(files, view_id)
    return View(record=record, read=partial(_read_column, files, record))


def _read_column(files: Files, record: ViewRecord, name: str) -> NDArray[Any]:
    """Read one column of a view.

    Raises:
        DamagedError: An object of the column is missing, or is not what was written.
    """
    dimension = column_dimensions(record)[name]
    n_rows = record.n_images if dimension == "image" else record.n_texts
    return read_column(
        files,
        folder=f"{view_folder(record.view)}/{name}",
        rows=n_rows,
        recorded=record.objects,
    )


def name_view(files: Files, view_id: str, name: str) -> ViewRecord:
    """Give a view another name: it is committed again under its number, and replaces the old one.

    Columns, identity and place among the views stay. An interrupted call leaves both, and the next
    one finishes.

    Raises:
        OptionError: The name is empty, looks like an id or a number, or belongs to another view.
        StoreError, DamagedError: As `commit_view` raises.
    """
    if not name.strip() or not name.isprintable() or VIEW_NUMBER.fullmatch(name):
        raise OptionError(f"name {name!r}: expected a word that is neither a number nor an id")
    old = open_view(files, view_id)
    for other_id in view_ids(files):
        other = read_view_record(files, other_id)
        if other.name == name and other.digest != old.record.digest:
            raise OptionError(f"view {other_id} has the name {name!r}; choose another")
    if old.record.name == name:
        return old.record
    renamed = replace(old, record=replace(old.record, name=name, objects={}))
    record = commit_view(files, renamed, number=view_number(view_id))
    remove_view(files, view_id)
    return record


def remove_view(files: Files, view_id: str) -> int:
    """Remove a view, but no features; returns the number of removed objects.

    An interrupted removal leaves the view whole, or objects that nothing refers to.
    """
    objects = files.sizes(view_folder(view_id))
    # The copy first: a copy without a record would count as a lost record.
    files.remove(f"{view_folder(view_id)}/{COPY}")
    files.remove(view_record_name(view_id))
    files.remove_folder(view_folder(view_id))
    return len(objects) + 1
