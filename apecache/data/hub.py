"""Data sets of Hugging Face's library `datasets`: saved on disk, or by name from the hub.

Nothing of a data set is executed: its loading scripts are not supported by the versions that we
accept.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from apecache.data.columns import Columns, choose_columns, image_keys, source_fields, to_row
from apecache.data.media import FolderMedia, check_bytes, media_below
from apecache.data.pairs import PairSource, Row, join_rows
from apecache.data.parquet import one_line
from apecache.data.spec import SPLITS, OpenSpec, require_only
from apecache.errors import ManifestError, MissingExtraError, RowError
from apecache.fingerprint import content_hash

PREFIX = "hf-datasets:"
NAME = re.compile(r"(?P<name>[^:@]+)(?::(?P<config>[^@]+))?(?:@(?P<revision>.+))?")


class Place(NamedTuple):
    part: int
    row: int


@dataclass(frozen=True, kw_only=True)
class HubMedia:
    """Images in the Arrow files of a data set. `parts` have one column, in Arrow's format: {bytes,
    path}.

    Rows with a path only are read as files, below `files.root` and nowhere else.
    """

    parts: tuple[Any, ...]
    places: Mapping[str, Place]
    files: FolderMedia
    place: str

    def read(self, key: str) -> bytes:
        if key not in self.places:
            raise RowError("missing", f"{key}: its row has no image")
        part, row = self.places[key]
        image = self.parts[part][row : row + 1].column(0)[0].as_py()
        data: bytes | None = image["bytes"]
        if data is None:
            return self.files.read(image["path"])
        check_bytes(len(data), key)
        return data

    def exists(self, key: str) -> bool:
        return key in self.places

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        return [self._size(key) for key in keys]

    def _size(self, key: str) -> int | None:
        if key not in self.places:
            return None
        from pyarrow import compute

        part, row = self.places[key]
        image = self.parts[part][row : row + 1].column(0)
        size = compute.binary_length(compute.struct_field(image, "bytes"))[0].as_py()
        if size is not None:
            return int(size)
        path = compute.struct_field(image, "path")[0].as_py()
        return self.files.sizes([path])[0] if path else None


class _Part(NamedTuple):
    """One split: its name (that of `SPLITS` where it is one) and its data."""

    name: str
    data: Any


def open_hub(uri: str, spec: OpenSpec) -> PairSource:
    """`hf-datasets:/folder` (also ./ and ~) as `save_to_disk` wrote it, or
    `hf-datasets:NAME[:CONFIG][@REVISION]`.

    The splits are the data set's own, `validation` as `val`. Keys as in Parquet tables: see
    `image_keys`.

    Raises:
        MissingExtraError: datasets is not installed.
        ManifestError: no such data set, or none that can be read; a missing or ambiguous column; no
            rows.
    """
    loaded, folder = _load(uri)
    named = loaded.items() if isinstance(loaded, dict) else [("", loaded)]
    parts = [_Part(SPLITS.get(name, name), data) for name, data in named]
    if not sum(len(part.data) for part in parts):
        raise ManifestError(f"{uri}: the data set has no rows; expected a row for every image")
    columns = _choose(parts[0].data.features, uri, spec)
    if any(part.data.features.keys() != parts[0].data.features.keys() for part in parts):
        raise ManifestError(
            f"{uri}: its splits have other columns than one another; save the one you want alone"
        )
    fields = source_fields(columns, parts[0].data.features)
    if columns.split is None and any(part.name for part in parts):
        fields = replace(fields, split="the data set's own splits")
    if _is_image(parts[0].data.features[columns.image]):
        require_only(spec, uri, "image_column", "caption_column", "split_column")
        return replace(_with_images(parts, columns=columns, uri=uri, folder=folder), fields=fields)
    rows = [
        _row(part, line=line, record=record, columns=columns, uri=uri)
        for part, line, record in _records(parts, [columns.image], columns)
    ]
    return PairSource(
        join_rows(rows, uri),
        origin=uri,
        media=media_below(spec.root or folder),
        fields=fields,
    )


def _load(uri: str) -> tuple[Any, Path]:
    """The data set, and the folder that its files may lie in."""
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
        asked = match.groupdict() if match else {}
        loaded = datasets.load_dataset(asked["name"], asked["config"], revision=asked["revision"])
        return loaded, Path(datasets.config.HF_CACHE_HOME)
    except (
        Exception
    ) as error:  # IndexError, KeyError, … of a damaged folder; what the hub raises; a script
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
    """As for tables, but the one column of images is the image's whatever its name."""
    images = [name for name, feature in features.items() if _is_image(feature)]
    if spec.image_column is None and len(images) == 1:
        others = [name for name in features if name not in images]
        return _renamed(
            choose_columns(["image", *(n for n in others if n != "image")], uri, spec),
            images[0],
        )
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
    parts: list[_Part],
    extra: list[str],
    columns: Columns,
) -> Iterator[tuple[_Part, int, dict[str, Any]]]:
    """(part, row from 1 in it, values) without images; class labels by their names."""
    from datasets import ClassLabel

    for part in parts:
        names = [*extra, *columns.names]
        label = part.data.features.get(columns.label) if columns.label else None
        plain = part.data.select_columns(names) if names else None
        for row, found in enumerate(
            plain if plain is not None else ({} for _ in range(len(part.data)))
        ):
            record = dict(found)
            if isinstance(label, ClassLabel) and isinstance(record[columns.label], int):
                number = record[columns.label]
                record[columns.label] = label.int2str(number) if number >= 0 else ""
            yield part, row + 1, record


def _row(part: _Part, line: int, record: Mapping[str, Any], columns: Columns, uri: str) -> Row:
    where = f"{uri}, {part.name}" if part.name else uri
    row = to_row(line, record=record, columns=columns, where=where)
    return (
        row
        if columns.split
        else Row(
            line=line,
            image=row.image,
            captions=row.captions,
            split=part.name,
            language=row.language,
            label=row.label,
        )
    )


def _with_images(parts: list[_Part], columns: Columns, uri: str, folder: Path) -> PairSource:
    """Bytes are not read, but where a path is repeated."""
    from datasets import Image

    images = tuple(
        part.data.select_columns([columns.image])
        .cast_column(columns.image, Image(decode=False))
        .with_format("arrow")
        for part in parts
    )
    places = [
        Place(number, row) for number, part in enumerate(parts) for row in range(len(part.data))
    ]
    numbers = [f"{parts[p].name}/{row}" if parts[p].name else str(row) for p, row in places]
    present, paths = _present(images)
    where = str(folder.resolve()) if _is_folder(uri.removeprefix(PREFIX)) else uri
    everything = HubMedia(
        parts=images,
        places=dict(zip(numbers, places, strict=True)),
        files=FolderMedia(root=folder),
        place=where,
    )

    def digest(row: int) -> str:
        try:
            return content_hash(everything.read(numbers[row]))
        except RowError:
            return ""

    keys = image_keys(paths, numbers, digest)
    first: dict[str, Place] = {}
    for key, place, there in zip(keys, places, present, strict=True):
        if there:
            first.setdefault(key, place)
    named = zip(_records(parts, [], columns), keys, strict=True)
    rows = [
        _row(part, line=line, record={**record, columns.image: key}, columns=columns, uri=uri)
        for (part, line, record), key in named
    ]
    return PairSource(join_rows(rows, uri), uri, replace(everything, places=first))


def _present(images: tuple[Any, ...], step: int = 1000) -> tuple[list[bool], list[str | None]]:
    """Of every row, whether it has an image, and its path if it has one."""
    from pyarrow import compute

    present: list[bool] = []
    paths: list[str | None] = []
    for part in images:
        for begin in range(0, len(part), step):
            structs = part[begin : begin + step].column(0)
            there = compute.is_valid(compute.struct_field(structs, "bytes")).to_pylist()
            here = compute.struct_field(structs, "path").to_pylist()
            present += [data or bool(path) for data, path in zip(there, here, strict=True)]
            paths += here
    return present, paths
