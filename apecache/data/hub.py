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

from apecache.data.columns import (
    Columns,
    choose_columns,
    image_keys,
    source_fields,
    to_row,
    with_class_label,
    with_only_image,
)
from apecache.data.media import FolderMedia, check_bytes, media_below
from apecache.data.pairs import PairSource, TableRow, source_of_rows
from apecache.data.parquet import FURTHER_IMAGES, class_name, open_parquet, parts_of
from apecache.data.row_groups import first_image, image_fields, is_list, one_line
from apecache.data.spec import (
    COLUMN_OPTIONS,
    FILE_OPTIONS,
    OpenSpec,
    distinct_splits,
    require_only,
)
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
    """Tables of one column of images, in Arrow's format, as `image_fields` takes them."""
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
        image = first_image(self.split_images[split_index][row : row + 1].column(0)[0].as_py())
        if not isinstance(image, bytes):
            return self.files.read(image or "")
        check_bytes(len(image), key)
        return image

    def exists(self, key: str) -> bool:
        return key in self.rows_by_key

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(key) for key in keys]

    def _size(self, key: str) -> int | None:
        if key not in self.rows_by_key:
            return None
        from pyarrow import compute

        split_index, row = self.rows_by_key[key]
        contents, paths = image_fields(self.split_images[split_index][row : row + 1].column(0))
        size = compute.binary_length(contents)[0].as_py()
        if size is not None:
            return int(size)
        path = paths[0].as_py() if paths is not None else None
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
    name = uri.removeprefix(PREFIX)
    folder = Path(name).expanduser()
    # A cloned data set is read as Parquet, which needs no `datasets` and no copy in a cache.
    if _is_folder(name) and folder.is_dir() and not _is_saved(folder):
        parquet = sorted(folder.rglob("*.parquet"))
        if parquet:
            return open_parquet(parts_of(parquet, uri), spec)
    loaded, folder = _load(uri)
    location = str(folder.resolve()) if _is_folder(name) else uri
    return _open_loaded(loaded, uri=uri, data_place=location, folder=folder, spec=spec)


def is_dataset(value: object) -> bool:
    """Return whether a value is a data set of the library, which is not imported."""
    is_known = type(value).__name__ in ("Dataset", "DatasetDict")
    return is_known and type(value).__module__.partition(".")[0] == "datasets"


def open_dataset(dataset: Any, spec: OpenSpec) -> PairSource:
    """Open a `Dataset` or a `DatasetDict` that is in memory; raises as `open_hub` does."""
    uri = "a data set in memory"
    return _open_loaded(dataset, uri=uri, data_place=uri, folder=Path.cwd(), spec=spec)


def _is_saved(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_loaded(
    loaded: Any,
    uri: str,
    data_place: str,
    folder: Path,
    spec: OpenSpec,
) -> PairSource:
    """Open a loaded data set.

    Args:
        loaded: A `Dataset` or `DatasetDict`.
        uri: How the user named it.
        data_place: Where it is.
        folder: Folder that its images may be files of.
        spec: What the user asked for.
    """
    named = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    split_of = distinct_splits(name for name, _ in named)
    splits = [_HubSplit(split_of[name], data) for name, data in named]
    if not sum(len(split.data) for split in splits):
        raise ManifestError(f"{uri}: the data set has no rows; expected a row for every image")
    features: dict[str, Any] = {}
    for split in splits:
        # The first split goes first: its types are those of columns that several have.
        features = {**split.data.features, **features}
    columns = _choose(features, uri, spec)
    if any(columns.image not in split.data.features for split in splits):
        raise ManifestError(
            f"{uri}: a split has no column {columns.image!r}; name the one that all have with "
            "--image-column"
        )
    fields = source_fields(columns, features)
    if columns.split is None and any(split.name for split in splits):
        fields = replace(fields, split="the data set's own splits")
    if _is_image(features[columns.image]):
        require_only(spec, uri, *COLUMN_OPTIONS)
        media, rows, n_further = _with_images(splits, columns=columns, uri=uri, folder=folder)
        source = source_of_rows(
            rows, origin=uri, media=replace(media, place=data_place), fields=fields
        )
        further = {FURTHER_IMAGES: n_further} if n_further else {}
        return replace(source, skipped={**source.skipped, **further})
    require_only(spec, uri, *COLUMN_OPTIONS, *FILE_OPTIONS)
    rows = []
    for split, line, record in _records(splits, [columns.image], columns):
        rows.append(_row(split, line=line, record=record, columns=columns, uri=uri))
    return source_of_rows(
        rows,
        origin=uri,
        media=media_below(spec.root or folder, spec.allow_root),
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
    """Return whether a column holds images: as such, as bytes, as structs, or as lists of them."""
    from datasets import Image, Value

    element = _list_element(feature)
    if element is not None:
        return _is_image(element)
    if isinstance(feature, dict):
        return {"bytes", "path"} <= feature.keys()
    is_binary = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary")
    return isinstance(feature, Image) or is_binary


def _list_element(feature: Any) -> Any:
    """Return the feature of a list's elements; None for what is not a list."""
    if isinstance(feature, list):
        return feature[0]
    # By name: older versions of `datasets` lack some of these classes.
    is_list = type(feature).__name__ in ("List", "LargeList", "Sequence")
    return feature.feature if is_list else None


def _choose(features: Mapping[str, Any], uri: str, spec: OpenSpec) -> Columns:
    """Choose columns as for tables, but take the only column of images whatever its name."""
    from datasets import ClassLabel

    images = [name for name, feature in features.items() if _is_image(feature)]
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    spec = with_class_label(with_only_image(spec, images), list(features), classes)
    return choose_columns(list(features), uri, spec)


def _records(
    splits: list[_HubSplit],
    extra: list[str],
    columns: Columns,
) -> Iterator[tuple[_HubSplit, int, dict[str, Any]]]:
    """Yield (split, 1-based row in it, values) without images, and with class labels as names."""
    for split in splits:
        names = [name for name in [*extra, *columns.names] if name in split.data.features]
        # Without a column, `datasets` would give no rows.
        selected = (
            split.data.select_columns(names) if names else repeat(dict[str, Any](), len(split.data))
        )
        classes = {name: getattr(split.data.features[name], "names", None) for name in names}
        for row, values in enumerate(selected):
            record = {name: class_name(value, classes[name]) for name, value in values.items()}
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


def _with_images(
    splits: list[_HubSplit],
    columns: Columns,
    uri: str,
    folder: Path,
) -> tuple[HubMedia, list[TableRow], int]:
    """Open a data set that holds its images; bytes are read only where a path is repeated.

    Returns:
        The media, the rows, and the number of images that are not the first of their row.
    """
    images = []
    for split in splits:
        # Without decoding: only bytes and paths are looked at here.
        column = split.data.select_columns([columns.image]).with_format(None)
        feature = _undecoded(column.features[columns.image])
        images.append(column.cast_column(columns.image, feature).with_format("arrow"))
    row_places = []
    numbers = []
    for split_index, split in enumerate(splits):
        for row in range(len(split.data)):
            row_places.append(HubRow(split_index, row))
            numbers.append(f"{split.name}/{row}" if split.name else str(row))
    present, paths, n_further = _present(tuple(images))
    everything = HubMedia(
        split_images=tuple(images),
        rows_by_key=dict(zip(numbers, row_places, strict=True)),
        files=FolderMedia(root=folder),
        place=uri,
    )

    def digest(row: int) -> str:
        try:
            return content_hash(everything.read(numbers[row]))
        except RowError:
            return ""

    # Rows of one path may differ in content, which only the hash shows.
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
    return replace(everything, rows_by_key=first), rows, n_further


def _undecoded(feature: Any) -> Any:
    """Return the feature of a column of images such that they are not decoded."""
    from datasets import Image, List

    element = _list_element(feature)
    if element is not None:
        return List(_undecoded(element))
    return Image(decode=False) if isinstance(feature, Image) else feature


def _present(
    images: tuple[Any, ...],
    step: int = 1000,
) -> tuple[list[bool], list[str | None], int]:
    """Return whether each row has an image, its path if it has one, and how many more images.

    Args:
        images: Tables of one column of images, one per split.
        step: Number of rows to look at together.
    """
    from pyarrow import compute

    present: list[bool] = []
    paths: list[str | None] = []
    n_further = 0
    for table in images:
        # Some rows at a time, because a struct holds the bytes of its image.
        for begin in range(0, len(table), step):
            column = table[begin : begin + step].column(0)
            if is_list(column.type):
                list_lengths = compute.list_value_length(column).to_pylist()
                n_further += sum(max(0, (count or 0) - 1) for count in list_lengths)
            contents, path_array = image_fields(column)
            has_bytes = compute.is_valid(contents).to_pylist()
            step_paths = [None] * len(column) if path_array is None else path_array.to_pylist()
            for with_bytes, path in zip(has_bytes, step_paths, strict=True):
                present.append(with_bytes or bool(path))
            paths += step_paths
    return present, paths, n_further
