"""Open folders of tars, of Parquet files or of images.

Images have a metadata table (Hugging Face's imagefolder) or texts beside them, lie in one folder
per class, or stand alone.

Keys are paths below the folder, in sorted order. What is not read is counted by its reason.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from apecache.data.delimited import first_lines, is_table
from apecache.data.file_tree import FileTree, read_tree
from apecache.data.media import media_below
from apecache.data.pairs import NO_SPLIT, PairSource, SourceFields, TableRow, source_of_rows
from apecache.data.parquet import open_parquet, parquet_rows, parts_of
from apecache.data.shards import open_shards
from apecache.data.sidecars import (
    SIDECAR_OPTIONS,
    TEXT_ENDINGS,
    TEXT_SIDECAR_OPTIONS,
    Sidecar,
    is_boxes,
    rules_near,
    sidecar_rows,
)
from apecache.data.spec import (
    COLUMN_OPTIONS,
    SPLITS,
    TEXT_OPTIONS,
    OpenSpec,
    distinct_splits,
    require_only,
)
from apecache.data.tables import joined_fields, table_rows
from apecache.data.text_files import open_text
from apecache.data.tfrecords import open_tfrecords
from apecache.errors import ManifestError

YEAR = re.compile(r"[-_]?(19|20)\d\d$")
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
TABLES = (".tsv", ".csv", ".jsonl", ".parquet", ".json")
NOT_CLASSES = ("images", "image", "img", "imgs", "jpegimages", "photos", "pictures")
"""Names of folders that say only that there are images in them."""
KNOWN_FILES = (
    "dataset_type.txt",
    "classnames.txt",
    "nshards.txt",
    "zeroshot_classification_templates.txt",
)
"""Files of clip_benchmark that are no data."""
NOT_NAMED = "images that the table does not name"
BOXES = "texts of numbers, no captions"
UNREADABLE = "texts that are links to files outside (allow them with --allow-root)"


def open_folder(folder: Path, spec: OpenSpec) -> PairSource:
    """Open a folder of any of these kinds.

    Raises:
        ManifestError: The folder is of no kind or of two, or its table or tars cannot be opened.
    """
    tree = read_tree(folder, spec.allow_root)
    names = {name for name in tree.files if "/" not in name}
    if names & {"state.json", "dataset_dict.json"}:
        raise ManifestError(
            f"{folder}: a data set of Hugging Face's library; open it as "
            f"hf-datasets:{folder.resolve()}"
        )
    tables = _metadata(tree)
    images = tree.images()
    tars = tree.ending(".tar")
    tfrecords = tree.ending(".tfrecord")
    parquet = tree.ending(".parquet")
    if tars and images:
        raise ManifestError(
            f"{folder}: both images ({images[0]}) and tars ({tars[0]}); give the tars alone, or "
            "move them away"
        )
    if tars:
        source = open_shards([folder / name for name in tars], str(folder), spec)
        return _counted(source, tree, used=tars)
    if tables:
        return _with_metadata(tree, tables, images=images, spec=spec)
    if tfrecords and not images:
        source = open_tfrecords([folder / name for name in tfrecords], str(folder), spec)
        return _counted(source, tree, used=tfrecords)
    if parquet and not images:
        parquet_parts = parts_of([folder / name for name in parquet], str(folder))
        return _counted(open_parquet(parquet_parts, spec), tree, used=parquet)
    if not images:
        left_out = f", only {_named(tree.files)}" if tree.files else ""
        raise ManifestError(
            f"{folder}: no images, no tars, no Parquet files and no {', '.join(METADATA)} in "
            f"it{left_out}; give the table itself if there is one"
        )
    return _images(tree, images, spec)


def _named(files: Sequence[str]) -> str:
    """Return the endings of some files, for a message."""
    endings = Counter(PurePosixPath(name).suffix or "no ending" for name in files)
    return ", ".join(f"{count} files of {ending}" for ending, count in endings.most_common(3))


def _counted(source: PairSource, tree: FileTree, used: Iterable[str]) -> PairSource:
    """Add the files that were not read to what the source left out."""
    used_names = set(used)
    skipped = Counter({**source.skipped, **tree.skipped})
    for name in tree.files:
        if name not in used_names and PurePosixPath(name).name not in KNOWN_FILES:
            suffix = PurePosixPath(name).suffix.lower()
            skipped[f"files {suffix}" if suffix else "files without an ending"] += 1
    return replace(source, skipped=dict(skipped))


def _metadata(tree: FileTree) -> list[Path]:
    """Return the metadata tables of the folder, or of its split folders."""
    by_folder: dict[str, list[str]] = {}
    for name in tree.files:
        folder = str(PurePosixPath(name).parent)
        if PurePosixPath(name).name in METADATA and (folder == "." or folder in SPLITS):
            by_folder.setdefault(folder, []).append(name)
    for folder, names in by_folder.items():
        if len(names) > 1:
            table_names = " and ".join(PurePosixPath(name).name for name in names)
            raise ManifestError(
                f"{tree.folder / folder}: {table_names}; expected one table: take one away"
            )
    if len(by_folder) > 1 and "." in by_folder:
        below = next(folder for folder in by_folder if folder != ".")
        raise ManifestError(
            f"{tree.folder}: a metadata table here and in {below}; take one of them away"
        )
    return [tree.folder / name for names in by_folder.values() for name in names]


def _with_metadata(
    tree: FileTree,
    tables: list[Path],
    images: Sequence[str],
    spec: OpenSpec,
) -> PairSource:
    folder = tree.folder
    require_only(spec, folder, *COLUMN_OPTIONS, *TEXT_OPTIONS, "allow_root")
    rows: list[TableRow] = []
    table_fields: list[SourceFields] = []
    for table in tables:
        below = table.parent.relative_to(folder).as_posix()
        read_rows = parquet_rows if table.suffix == ".parquet" else table_rows
        new_rows, new_fields = read_rows(table, spec)
        table_fields.append(new_fields)
        rows += [_placed(row, "" if below == "." else below) for row in new_rows]
    fields = joined_fields(table_fields)
    if fields.split is None and not spec.resplits:
        rows = _with_folder_splits(rows)
        if any(row.split for row in rows):
            fields = replace(fields, split="folder")
    media = media_below(folder, spec.allow_root)
    source = source_of_rows(rows, origin=str(folder), media=media, fields=fields)
    named = {row.image for row in rows}
    not_named = [name for name in images if name not in named]
    used = [*(table.relative_to(folder).as_posix() for table in tables), *images]
    source = _counted(source, tree, used=used)
    if not not_named:
        return source
    return replace(source, skipped={**source.skipped, NOT_NAMED: len(not_named)})


def _placed(row: TableRow, below: str) -> TableRow:
    """Return the row with its image as a path below the folder."""
    return replace(row, image=f"{below}/{row.image}") if below else row


def _with_folder_splits(rows: Sequence[TableRow]) -> list[TableRow]:
    """Give the rows the split that the first folder of their image says."""
    first_folders = [row.image.partition("/")[0] if "/" in row.image else "" for row in rows]
    split_of = distinct_splits(name for name in first_folders if name in SPLITS)
    return [
        replace(row, split=row.split or split_of.get(name, NO_SPLIT))
        for row, name in zip(rows, first_folders, strict=True)
    ]


def _images(tree: FileTree, images: list[str], spec: OpenSpec) -> PairSource:
    """Open images with texts beside them, in folders of classes, or alone."""
    folder = tree.folder
    texts, n_boxes = _texts(tree, images, spec)
    skipped: Counter[str] = Counter({BOXES: n_boxes} if n_boxes else {})
    has_fields = any("json" in image_texts for image_texts in texts.values())
    allowed = SIDECAR_OPTIONS if has_fields else TEXT_SIDECAR_OPTIONS
    require_only(spec, folder, *allowed, "allow_root")
    splits, labels = folder_roles(images)
    if not any(texts.values()):
        _require_no_loose(folder, images, splits)
        _require_no_table(tree, labels)
    else:
        # Folders of images with texts are parts of a download, and not classes.
        labels = [""] * len(images)
    sidecars = []
    used = list(images)
    for image, split, label in zip(images, splits, labels, strict=True):
        used += texts[image].values()
        contents = {ending: _read(tree, name, spec) for ending, name in texts[image].items()}
        skipped[UNREADABLE] += sum(text is None for text in contents.values())
        sidecar = Sidecar(
            key=image,
            location=str(folder / image),
            texts={ending: text for ending, text in contents.items() if text is not None},
            split=split,
            label=label,
        )
        sidecars.append(sidecar)
    rules = rules_near(folder, spec)
    rows, fields, joined = sidecar_rows(sidecars, rules=rules, origin=str(folder), spec=spec)
    fields = replace(
        fields,
        image="file",
        split=fields.split or ("folder" if any(splits) else None),
        label=fields.label or ("folder" if any(labels) else None),
    )
    media = media_below(folder, spec.allow_root)
    source = source_of_rows(rows, origin=str(folder), media=media, fields=fields)
    counted = _counted(source, tree, used=used)
    # Adding drops the reasons with a count of zero.
    return replace(counted, skipped={**counted.skipped, **(skipped + joined)})


def _texts(
    tree: FileTree,
    images: Sequence[str],
    spec: OpenSpec,
) -> tuple[dict[str, dict[str, str]], int]:
    """Return the texts beside each image by their ending: `a.txt` or `a.jpg.txt` beside `a.jpg`.

    Returns:
        The names of the texts of each image, and the number of texts that are only numbers.
    """
    names = set(tree.files)
    endings = {ending: f".{ending}" for ending in TEXT_ENDINGS}
    if spec.caption_ext is not None:
        endings = {"txt": f".{spec.caption_ext.removeprefix('.')}", "json": ".json"}
    texts: dict[str, dict[str, str]] = {}
    n_boxes = 0
    for image in images:
        stem = image[: len(image) - len(PurePosixPath(image).suffix)]
        texts[image] = {}
        for role, ending in endings.items():
            name = next((text for text in (stem + ending, image + ending) if text in names), None)
            if name is not None and role == "txt" and is_boxes(_read(tree, name, spec) or ""):
                n_boxes += 1
            elif name is not None:
                texts[image][role] = name
    return texts, n_boxes


def _read(tree: FileTree, name: str, spec: OpenSpec) -> str | None:
    """Return a text; None if it is a link that leads out of the folder, or to no file.

    Raises:
        ManifestError: It is not UTF-8.
    """
    media = media_below(tree.folder, spec.allow_root)
    if not media.exists(name):
        return None
    with open_text(tree.folder / name) as file:
        return file.read()


def folder_roles(images: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the split and the label that the folders of each image say.

    A level of folders whose names are all those of splits gives the splits. Of the other levels
    the first one with different names gives the labels; folders such as `images` say nothing.
    """
    folders = [image.split("/")[:-1] for image in images]
    split_names = [""] * len(images)
    depth = _split_depth(folders)
    if depth is not None:
        split_names = [_without_year(names.pop(depth)) for names in folders]
        if len({tuple(names[:depth]) for names in folders}) == 1:
            folders = [names[depth:] for names in folders]
    folders = [[name for name in names if name.lower() not in NOT_CLASSES] for names in folders]
    deeper = folders
    while all(len(names) > 1 for names in deeper) and len({names[0] for names in deeper}) == 1:
        deeper = [names[1:] for names in deeper]
    if len({names[0] for names in deeper if names}) > 1:
        folders = deeper
    split_of = distinct_splits(split_names)
    labels = [names[0] if names else "" for names in folders]
    return [split_of[name] for name in split_names], labels


def _without_year(name: str) -> str:
    """Return the name of a folder without a year: COCO's folders are called train2017."""
    return YEAR.sub("", name)


def _split_depth(folders: Sequence[Sequence[str]]) -> int | None:
    """Return the level of folders whose names are all those of splits."""
    for depth in range(min(map(len, folders))):
        if all(_without_year(names[depth]) in SPLITS for names in folders):
            return depth
    return None


def _require_no_loose(folder: Path, images: Sequence[str], splits: Sequence[str]) -> None:
    """Refuse images in the folder itself beside images in folders of classes."""
    loose = [image for image in images if "/" not in image]
    if loose and len(loose) < len(images) and not any(splits):
        raise ManifestError(
            f"{folder}: images both in it ({loose[0]}) and in folders below; expected either, or "
            "a metadata.csv"
        )


def _require_no_table(tree: FileTree, labels: Sequence[str]) -> None:
    """Refuse images without classes beside a table, which says more than their names do."""
    top = [name for name in tree.files if "/" not in name]
    tables = [name for name in top if name.endswith(TABLES)]
    for name in top:
        path = tree.folder / name
        # Flickr8k comes as a folder of images with captions.txt beside it.
        if name.endswith((".txt", ".token")) and is_table(first_lines(path), path, OpenSpec()):
            tables.append(name)
    if tables and len(set(labels)) == 1:
        raise ManifestError(
            f"{tree.folder}: images without classes, and a table ({tables[0]}) beside them; give "
            f"{tree.folder / tables[0]}, or, "
            "for images alone, a folder that holds nothing else"
        )
