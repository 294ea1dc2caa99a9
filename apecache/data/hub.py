"""Open data sets of Hugging Face's library `datasets`: saved on disk, or by name from the hub.

No code of a data set is executed: the accepted versions of the library do not support loading
scripts.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

from apecache.data.columns import Columns, choose_columns, image_keys, source_fields, to_row
from apecache.data.media import FolderMedia, check_bytes, media_below
from apecache.data.pairs import PairSource, TableRow, join_rows
from apecache.data.parquet import one_line
from apecache.data.spec import SPLITS, OpenSpec, require_only
from apecache.errors import ManifestError, MissingExtraError, RowError
from apecache.fingerprint import content_hash

PREFIX = "hf-datasets:"
NAME = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")


class HubRow(NamedTuple):
    """Locate one row: the number of its split, and its number inside the split."""

    split_index: int
    row: int


@dataclass(frozen=True, kw_only=True)
class HubMedia:
    """Read images from the Arrow files of a data set."""

    split_images: tuple[Any, ...]
    """Tables of one column, in Arrow's format: structs of bytes and path."""
    rows_by_key: Mapping[str, HubRow]
    """The row of each key."""
    files: FolderMedia
    """Reads rows that have only a path, below its root and nowhere else."""
    place: str
    """The folder or name of the data set."""

    def read(self, key: str) -> bytes:
        if key not in self.rows_by_key:
            raise RowError("missing", f"{key}: its row has no image")
        split_index, row = self.rows_by_key[key]
        image = self.split_images[split_index][row : row + 1].column(0)[0].as_py()
        data: bytes | None = image["bytes"]
        if data is None:
            return self.files.read(image["path"])
        check_bytes(len(data), key)
        return data

    def exists(self, key: str) -> bool:
        return key in self.rows_by_key

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(key) for key in keys]

    def _size(self, key: str) -> int | None:
        if key not in self.rows_by_key:
            return None
        from pyarrow import compute

        split_index, row = self.rows_by_key[key]
        image = self.split_images[split_index][row : row + 1].column(0)
        data = compute.struct_field(image, "bytes")
        size = compute.binary_length(data)[0].as_py()
        if size is not None:
            return int(size)
        path = compute.struct_field(image, "path")[0].as_py()
        return self.files.sizes([path])[0] if path else None


class _HubSplit(NamedTuple):
    """Hold one split: its name, normalized by `SPLITS`, and its data."""

    name: str
    data: Any


def open_hub(uri: str, spec: OpenSpec) -> PairSource:
    """Open a data set.

    The splits are the data set's own, with `validation` as `val`. `image_keys` chooses the keys, as
    in Parquet tables.

    Args:
        uri: `hf-datasets:/folder` (also ./ and ~) as `save_to_disk` wrote it, or
            `hf-datasets:NAME[:CONFIG][@REVISION]`.
        spec: What the user asked for.

    Raises:
        MissingExtraError: datasets is not installed.
        ManifestError: There is no such data set, it cannot be read or has no rows, or a column is
            missing or ambiguous.
    """
    loaded, folder = _load(uri)
    named = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    splits = [_HubSplit(SPLITS.get(name, name), data) for name, data in named]
    if not sum(len(split.data) for split in splits):
        raise ManifestError(f"{uri}: the data set has no rows; expected a row for every image")
    features = splits[0].data.features
    columns = _choose(features, uri, spec)
    if any(split.data.features.keys() != features.keys() for split in splits):
        raise ManifestError(
            f"{uri}: its splits have other columns than one another; save the one you want alone"
        )
    fields = source_fields(columns, features)
    if columns.split is None and any(split.name for split in splits):
        fields = replace(fields, split="the data set's own splits")
    if _is_image(features[columns.image]):
        require_only(spec, uri, "image_column", "caption_column", "split_column")
        source = _with_images(splits, columns=columns, uri=uri, folder=folder)
        return replace(source, fields=fields)
    rows = []
    for split, line, record in _records(splits, [columns.image], columns):
        rows.append(_row(split, line=line, record=record, columns=columns, uri=uri))
    return PairSource(
        join_rows(rows, uri),
        origin=uri,
        media=media_below(spec.root or folder),
        fields=fields,
    )


def _load(uri: str) -> tuple[Any, Path]:
    """Load the data set; return it with the folder that its images may be files of."""
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "hf") from None
    name = uri.removeprefix(PREFIX)
    match = NAME.fullmatch(name)
    if match is None and not _is_folder(name):
        raise ManifestError(
            f"{uri}: no name; expected {PREFIX}/folder or {PREFIX}NAME[:CONFIG][@REVISION]"
        )
    try:
        if _is_folder(name):
            folder = Path(name).expanduser()
            return datasets.load_from_disk(str(folder)), folder
        name_parts = match.groupdict() if match else {}
        loaded = datasets.load_dataset(
            name_parts["name"],
            name_parts["config"],
            revision=name_parts["revision"],
        )
        return loaded, Path(datasets.config.HF_CACHE_HOME)
    except Exception as error:
        # A damaged folder raises IndexError, KeyError and others, the hub raises its own errors.
        raise ManifestError(
            f"{uri}: cannot be opened ({one_line(error)}); expected {PREFIX}/folder, as "
            "save_to_disk wrote it, or the "
            "name of a data set on the hub"
        ) from None


def _is_folder(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~"))


def _is_image(feature: Any) -> bool:
    from datasets import Image

    return isinstance(feature, Image)


def _choose(features: Mapping[str, Any], uri: str, spec: OpenSpec) -> Columns:
    """Choose columns as for tables, but take the only column of images whatever its name."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    if spec.image_column is None and len(images) == 1:
        # `choose_columns` sees the column of images under the name that it prefers.
        other_columns = [name for name in features if name not in (*images, "image")]
        columns = choose_columns(["image", *other_columns], uri, spec)
        return _renamed(columns, images[0])
    return choose_columns(list(features), uri, spec)


def _renamed(columns: Columns, image: str) -> Columns:
    return Columns(
        image=image,
        caption=columns.caption,
        split=columns.split,
        language=columns.language,
        label=columns.label,
    )


def _records(
    splits: list[_HubSplit],
    extra: list[str],
    columns: Columns,
) -> Iterator[tuple[_HubSplit, int, dict[str, Any]]]:
    """Yield (split, 1-based row in it, values) without images, and with class labels as names."""
    from datasets import ClassLabel

    for split in splits:
        names = [*extra, *columns.names]
        label = split.data.features.get(columns.label) if columns.label else None
        # Without a column, `datasets` would give no rows.
        selected = (
            split.data.select_columns(names) if names else repeat(dict[str, Any](), len(split.data))
        )
        for row, values in enumerate(selected):
            record = dict(values)
            if isinstance(label, ClassLabel) and isinstance(record[columns.label], int):
                # The library writes -1 for a row without a label.
                number = record[columns.label]
                record[columns.label] = label.int2str(number) if number >= 0 else ""
            yield split, row + 1, record


def _row(
    split: _HubSplit,
    line: int,
    record: Mapping[str, Any],
    columns: Columns,
    uri: str,
) -> TableRow:
    location = f"{uri}, {split.name}" if split.name else uri
    row = to_row(line, record=record, columns=columns, where=location)
    return row if columns.split else replace(row, split=split.name)


def _with_images(splits: list[_HubSplit], columns: Columns, uri: str, folder: Path) -> PairSource:
    """Open a data set that holds its images; bytes are read only where a path is repeated."""
    from datasets import Image

    images = []
    for split in splits:
        column = split.data.select_columns([columns.image])
        undecoded = column.cast_column(columns.image, Image(decode=False))
        images.append(undecoded.with_format("arrow"))
    row_places = []
    numbers = []
    for split_index, split in enumerate(splits):
        for row in range(len(split.data)):
            row_places.append(HubRow(split_index, row))
            numbers.append(f"{split.name}/{row}" if split.name else str(row))
    present, paths = _present(tuple(images))
    location = str(folder.resolve()) if _is_folder(uri.removeprefix(PREFIX)) else uri
    everything = HubMedia(
        split_images=tuple(images),
        rows_by_key=dict(zip(numbers, row_places, strict=True)),
        files=FolderMedia(root=folder),
        place=location,
    )

    def digest(row: int) -> str:
        try:
            return content_hash(everything.read(numbers[row]))
        except RowError:
            return ""

    keys = image_keys(paths, numbers, digest)
    first: dict[str, HubRow] = {}
    for key, row_place, has_image in zip(keys, row_places, present, strict=True):
        # Rows of one path share a key, and the first of them with an image gives it.
        if has_image:
            first.setdefault(key, row_place)
    rows = []
    # The column of images is not read: a row names its image by the key.
    for (split, line, record), key in zip(_records(splits, [], columns), keys, strict=True):
        named = {**record, columns.image: key}
        rows.append(_row(split, line=line, record=named, columns=columns, uri=uri))
    return PairSource(join_rows(rows, uri), uri, replace(everything, rows_by_key=first))


def _present(images: tuple[Any, ...], step: int = 1000) -> tuple[list[bool], list[str | None]]:
    """Return whether each row has an image, and its path if it has one.

    Args:
        images: Tables of one column of images, one per split.
        step: Number of rows to look at together.
    """
    from pyarrow import compute

    present: list[bool] = []
    paths: list[str | None] = []
    for table in images:
        # Some rows at a time, because a struct holds the bytes of its image.
        for begin in range(0, len(table), step):
            structs = table[begin : begin + step].column(0)
            data = compute.struct_field(structs, "bytes")
            has_bytes = compute.is_valid(data).to_pylist()
            step_paths = compute.struct_field(structs, "path").to_pylist()
            for with_bytes, path in zip(has_bytes, step_paths, strict=True):
                present.append(with_bytes or bool(path))
            paths += step_paths
    return present, paths
