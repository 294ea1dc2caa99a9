"""Verify the views of a store: their records, the copies of these, their columns and blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from apecache.errors import ApecacheError, DamagedError
from apecache.fingerprint import content_hash
from apecache.storage.files import TEMPORARY, Files
from apecache.store.layout import (
    SOURCE,
    STAMPS,
    VIEW_RECORDS,
    VIEWS,
    view_folder,
    view_record_name,
)
from apecache.store.problem import Problem
from apecache.store.records import read_record
from apecache.store.stamp_file import HASH_BYTES, MAGIC, read_stamp_file
from apecache.store.views import COPY, VIEW_ID, ViewRecord, read_view_record


@dataclass(kw_only=True)
class ViewCheck:
    """Collect what a verification of views finds."""

    problems: list[Problem] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    """Names of all objects that a record or a rule accounts for."""
    object_bytes: list[int] = field(default_factory=list)
    """Bytes of each object that was hashed."""


def check_views(files: Files) -> ViewCheck:
    """Verify all views of a store, and what it remembers of image files."""
    check = ViewCheck()
    names = (name.removesuffix(".json") for name in files.list(VIEW_RECORDS))
    recorded = [name for name in names if VIEW_ID.fullmatch(name)]
    for view_id in recorded:
        _check_view(files, view_id, check)
    for view_id in files.list(VIEWS):
        if view_id not in recorded and VIEW_ID.fullmatch(view_id):
            _check_unrecorded(files, view_id, check)
    _check_stamps(files, check)
    return check


def _check_view(files: Files, view_id: str, check: ViewCheck) -> None:
    name = view_record_name(view_id)
    check.known.add(name)
    try:
        record = read_view_record(files, view_id)
    except ApecacheError as error:
        check.problems.append(Problem(kind="damaged", object=name, detail=str(error)))
        # Without its record, nothing is known about the other objects of the view.
        check.known.update(_objects(files, view_id))
        return
    check.problems += _copy_problems(files, view_id, check)
    for object_name, entry in record.objects.items():
        check.known.add(object_name)
        try:
            data = files.read(object_name)
        except FileNotFoundError:
            problem = Problem(kind="missing", object=object_name, detail="the file is missing")
            check.problems.append(problem)
            continue
        check.object_bytes.append(len(data))
        if content_hash(data) != entry["blake3"]:
            detail = "its hash differs from its record"
            check.problems.append(Problem(kind="damaged", object=object_name, detail=detail))
    check.problems += _block_problems(files, record)


def _copy_problems(files: Files, view_id: str, check: ViewCheck) -> Iterator[Problem]:
    copy = f"{view_folder(view_id)}/{COPY}"
    check.known.add(copy)
    if not files.exists(copy):
        detail = "the view is committed, but the copy of its record is missing"
        yield Problem(kind="unsealed", object=copy, detail=detail)
        return
    data = files.read(copy)
    check.object_bytes.append(len(data))
    if data != files.read(view_record_name(view_id)):
        yield Problem(kind="damaged", object=copy, detail="differs from the record of the view")


def _block_problems(files: Files, record: ViewRecord) -> Iterator[Problem]:
    """Yield blocks of a view that are lost or swapped; the blocks themselves are verified too."""
    for block in record.blocks:
        try:
            source = read_record(files.child(block.folder), SOURCE)
        except DamagedError:
            # A lost or damaged source is reported when the block itself is verified.
            continue
        if source["digest"] != block.digest:
            detail = f"not the block that view {record.view} was made of"
            yield Problem(kind="damaged", object=block.folder or SOURCE, detail=detail)


def _check_unrecorded(files: Files, view_id: str, check: ViewCheck) -> None:
    """Report a view that has objects, but no record."""
    names = _objects(files, view_id)
    check.known.update(names)
    if f"{view_folder(view_id)}/{COPY}" in names:
        name = view_record_name(view_id)
        detail = "the record of a view is missing"
        check.problems.append(Problem(kind="missing", object=name, detail=detail))
        return
    for name in names:
        detail = "no record of the view"
        check.problems.append(Problem(kind="uncommitted", object=name, detail=detail))


def _objects(files: Files, view_id: str) -> list[str]:
    """Return the names of all objects of a view, without temporary ones."""
    names = files.sizes(view_folder(view_id))
    return [name for name in names if not name.rpartition("/")[2].startswith(TEMPORARY)]


def _check_stamps(files: Files, check: ViewCheck) -> None:
    check.known.add(STAMPS)
    try:
        body = read_stamp_file(files)
    except DamagedError as error:
        check.problems.append(Problem(kind="damaged", object=STAMPS, detail=str(error)))
    else:
        if files.exists(STAMPS):
            check.object_bytes.append(len(MAGIC) + HASH_BYTES + len(body))
