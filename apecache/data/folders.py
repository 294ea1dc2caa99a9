"""Folders: of tars, of images with a metadata table (Hugging Face's imagefolder), a folder per
class, or images alone.

Keys are paths below the folder, in sorted order; hidden files are passed over, links to folders not
followed.
"""

import os
from dataclasses import replace
from pathlib import Path, PurePosixPath

from apecache.data.images import SUFFIXES
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource, Row, SourceFields, join_rows
from apecache.data.parquet import parquet_rows
from apecache.data.shards import open_shards
from apecache.data.spec import SPLITS, OpenSpec, require_only
from apecache.data.tables import table_rows
from apecache.errors import ManifestError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".tsv", ".csv", ".jsonl", ".parquet", ".json")


def open_folder(folder: Path, spec: OpenSpec) -> PairSource:
    """Whatever kind of folder it is.

    Raises:
        ManifestError: none of them, or two at once; and what the table or the tars raise.
    """
    names = sorted(entry.name for entry in os.scandir(folder))
    tars = [folder / name for name in names if name.endswith(".tar")]
    if tars and any(name.lower().endswith(SUFFIXES) for name in names):
        raise ManifestError(
            f"{folder}: both images and tars ({tars[0].name}); give the tars alone, or move "
            "them away"
        )
    if tars:
        return open_shards(tars, str(folder), spec)
    if "state.json" in names or "dataset_dict.json" in names:
        raise ManifestError(
            f"{folder}: a data set of Hugging Face's library; open it as "
            f"hf-datasets:{folder.resolve()}"
        )
    tables = _metadata(folder, names)
    if tables:
        return _with_metadata(folder, tables, spec)
    require_only(spec, folder)
    source = _images(folder)
    _require_no_table(folder, names, source)
    return source


def _metadata(folder: Path, names: list[str]) -> list[Path]:
    """The metadata tables of the folder, or of its split folders."""
    places = [
        folder,
        *(folder / name for name in names if name in SPLITS and (folder / name).is_dir()),
    ]
    tables = []
    for place in places:
        found = [place / name for name in METADATA if (place / name).is_file()]
        if len(found) > 1:
            raise ManifestError(
                f"{place}: {' and '.join(p.name for p in found)}; expected one table: take one away"
            )
        tables += found
    if len(tables) > 1 and tables[0].parent == folder:
        raise ManifestError(
            f"{folder}: a metadata table here and in {tables[1].parent.name}; take one of them away"
        )
    return tables


def _with_metadata(folder: Path, tables: list[Path], spec: OpenSpec) -> PairSource:
    require_only(spec, folder, "image_column", "caption_column", "split_column")
    rows: list[Row] = []
    fields = SourceFields()
    for table in tables:
        below = table.parent.relative_to(folder).as_posix()
        read, fields = (
            parquet_rows(table, spec) if table.suffix == ".parquet" else table_rows(table, spec)
        )
        rows += [_placed(row, "" if below == "." else below) for row in read]
    if fields.split is None and any(row.split for row in rows):
        fields = replace(fields, split="folder")
    return PairSource(
        join_rows(rows, str(folder)),
        origin=str(folder),
        media=FolderMedia(root=folder),
        fields=fields,
    )


def _placed(row: Row, below: str) -> Row:
    """Its image as a path below the folder; without a column for it, the split is the first folder
    of that path."""
    key = f"{below}/{row.image}" if below else row.image
    first = PurePosixPath(key).parts[0] if "/" in key else ""
    return replace(row, image=key, split=row.split or SPLITS.get(first, ""))


def _images(folder: Path) -> PairSource:
    keys = sorted(_keys(folder))
    if not keys:
        raise ManifestError(
            f"{folder}: no images ({', '.join(SUFFIXES)}), no tars and no {', '.join(METADATA)} "
            "in it; give the table "
            "itself if there is one"
        )
    depths = {min(key.count("/"), 1) for key in keys}
    if len(depths) > 1:
        loose = next(key for key in keys if "/" not in key)
        raise ManifestError(
            f"{folder}: images both in it ({loose}) and in folders below; expected either, or "
            "a metadata.csv"
        )
    in_splits = all(key.partition("/")[0] in SPLITS for key in keys)
    pairs = tuple(_pair(key, in_splits) for key in keys)
    fields = SourceFields(
        image="file",
        split="folder" if in_splits else None,
        label="folder" if any(pair.label for pair in pairs) else None,
    )
    return PairSource(pairs, origin=str(folder), media=FolderMedia(root=folder), fields=fields)


def _require_no_table(folder: Path, names: list[str], source: PairSource) -> None:
    """A table beside images without classes says more about them than their names do."""
    tables = [name for name in names if name.endswith(TABLES)]
    if tables and len({pair.label for pair in source}) == 1:
        raise ManifestError(
            f"{folder}: images without classes, and a table ({tables[0]}) beside them; give "
            f"{folder / tables[0]}, or, "
            "for images alone, a folder that holds nothing else"
        )


def _pair(key: str, in_splits: bool) -> Pair:
    """Above the file, the folders are [split/][class/…]."""
    folders = key.split("/")[:-1]
    split = SPLITS[folders.pop(0)] if in_splits and folders else ""
    return Pair(
        key=key,
        captions=(),
        languages=(),
        split=split,
        label=folders[0] if folders else "",
    )


def _keys(folder: Path) -> list[str]:
    keys = []
    for place, below, files in os.walk(folder):
        below[:] = [name for name in below if not name.startswith(".")]
        relative = Path(place).relative_to(folder)
        images = (
            name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES)
        )
        keys += [(relative / name).as_posix() for name in images]
    return keys
