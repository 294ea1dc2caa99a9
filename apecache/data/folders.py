"""Open folders of tars or of images.

Images have a metadata table (Hugging Face's imagefolder), lie in one folder per class, or stand
alone.

Keys are paths below the folder, in sorted order. Hidden files are skipped, and links to folders are
not followed.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from apecache.data.images import SUFFIXES
from apecache.data.media import FolderMedia
from apecache.data.pairs import Pair, PairSource, SourceFields, TableRow, join_rows
from apecache.data.parquet import parquet_rows
from apecache.data.shards import open_shards
from apecache.data.spec import SPLITS, OpenSpec, require_only
from apecache.data.tables import table_rows
from apecache.errors import ManifestError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".tsv", ".csv", ".jsonl", ".parquet", ".json")


def open_folder(folder: Path, spec: OpenSpec) -> PairSource:
    """Open a folder of any of these kinds.

    Raises:
        ManifestError: The folder is of no kind or of two, or its table or tars cannot be opened.
    """
    names = sorted(os.listdir(folder))
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
    """Return the metadata tables of the folder, or of its split folders."""
    split_folders = [folder / name for name in names if name in SPLITS]
    table_folders = [folder, *filter(Path.is_dir, split_folders)]
    tables = []
    for table_folder in table_folders:
        candidates = [table_folder / name for name in METADATA if (table_folder / name).is_file()]
        if len(candidates) > 1:
            table_names = " and ".join(path.name for path in candidates)
            raise ManifestError(f"{table_folder}: {table_names}; expected one table: take one away")
        tables += candidates
    if len(tables) > 1 and tables[0].parent == folder:
        raise ManifestError(
            f"{folder}: a metadata table here and in {tables[1].parent.name}; take one of them away"
        )
    return tables


def _with_metadata(folder: Path, tables: list[Path], spec: OpenSpec) -> PairSource:
    require_only(spec, folder, "image_column", "caption_column", "split_column")
    rows: list[TableRow] = []
    table_fields: list[SourceFields] = []
    for table in tables:
        below = table.parent.relative_to(folder).as_posix()
        read_rows = parquet_rows if table.suffix == ".parquet" else table_rows
        new_rows, new_fields = read_rows(table, spec)
        table_fields.append(new_fields)
        rows += [_placed(row, "" if below == "." else below) for row in new_rows]
    fields = _all_fields(table_fields)
    if fields.split is None and any(row.split for row in rows):
        fields = replace(fields, split="folder")
    return PairSource(
        join_rows(rows, str(folder)),
        origin=str(folder),
        media=FolderMedia(root=folder),
        fields=fields,
    )


def _all_fields(table_fields: Sequence[SourceFields]) -> SourceFields:
    """Join the fields of several tables: a role has the fields that any of them reads it from."""
    names_by_role: dict[str, dict[str, None]] = {}
    unused: dict[str, None] = {}
    for fields in table_fields:
        for role, name in fields.taken.items():
            names_by_role.setdefault(role, {})[name] = None
        unused |= dict.fromkeys(fields.unused)
    joined_names = {role: ", ".join(names) for role, names in names_by_role.items()}
    return SourceFields(**joined_names, unused=tuple(unused))


def _placed(row: TableRow, below: str) -> TableRow:
    """Return the row with its image as a path below the folder.

    Without a split column, the split is the first folder of that path.
    """
    key = f"{below}/{row.image}" if below else row.image
    first = PurePosixPath(key).parts[0] if "/" in key else ""
    return replace(row, image=key, split=row.split or SPLITS.get(first, ""))


def _images(folder: Path) -> PairSource:
    # Sorted, because the file system lists files in no defined order.
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
    # Folders below are either all splits or all classes.
    in_splits = all(key.partition("/")[0] in SPLITS for key in keys)
    pairs = tuple(_pair(key, in_splits) for key in keys)
    fields = SourceFields(
        image="file",
        split="folder" if in_splits else None,
        label="folder" if any(pair.label for pair in pairs) else None,
    )
    return PairSource(pairs, origin=str(folder), media=FolderMedia(root=folder), fields=fields)


def _require_no_table(folder: Path, names: list[str], source: PairSource) -> None:
    """Refuse images without classes beside a table, which says more than their names do."""
    tables = [name for name in names if name.endswith(TABLES)]
    if tables and len({pair.label for pair in source}) == 1:
        raise ManifestError(
            f"{folder}: images without classes, and a table ({tables[0]}) beside them; give "
            f"{folder / tables[0]}, or, "
            "for images alone, a folder that holds nothing else"
        )


def _pair(key: str, in_splits: bool) -> Pair:
    """Return the pair of one image, whose folders are [split/][class/…]."""
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
    for directory, subfolders, files in os.walk(folder):
        # In place: os.walk then does not enter the hidden folders.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(directory).relative_to(folder)
        for name in files:
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                keys.append((relative / name).as_posix())
    return keys
