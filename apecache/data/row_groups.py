"""Read images from a column of one or several Parquet files."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from apecache.data.media import FolderMedia, check_bytes
from apecache.errors import RowError

GROUPS_KEPT = 2
"""Number of decoded row groups in memory. Images are read almost in order, so that reads at one
time span at most two."""


class ParquetRow(NamedTuple):
    """Locate a row: its file, its row group in the file, and its number inside the group."""

    file: int
    group: int
    row: int


@dataclass(frozen=True, kw_only=True)
class TableMedia:
    """Read images from a column of Parquet files."""

    groups: "RowGroups"
    places: Mapping[str, ParquetRow]
    """The row of each key."""
    files: FolderMedia
    """Reads rows that have only a path, below its root and nowhere else."""

    @property
    def place(self) -> str:
        """Return the paths of the first and the last file, or of the only one."""
        first_and_last = dict.fromkeys((self.groups.paths[0], self.groups.paths[-1]))
        return " … ".join(str(path.resolve()) for path in first_and_last)

    def read(self, key: str) -> bytes:
        if key not in self.places:
            raise RowError("missing", f"{key}: its row has no image")
        image = self.groups.read(self.places[key], key)
        return self.files.read(image) if isinstance(image, str) else image

    def exists(self, key: str) -> bool:
        return key in self.places

    def sizes(self, keys: Sequence[str]) -> list[int | None]:
        """Return the sizes, by decoding each row group once: Parquet does not record them."""
        groups = {self.places[key][:2] for key in keys if key in self.places}
        sizes_by_group: dict[tuple[int, int], list[int | None]] = {}
        for file, group in sorted(groups):
            sizes_by_group[file, group] = self.groups.sizes(file, group)
        return [self._size(key, sizes_by_group) for key in keys]

    def _size(
        self,
        key: str,
        sizes_by_group: Mapping[tuple[int, int], Sequence[int | None]],
    ) -> int | None:
        if key not in self.places:
            return None
        file, group, row = self.places[key]
        group_sizes = sizes_by_group[file, group]
        return group_sizes[row] if row < len(group_sizes) else None


class RowGroups:
    """Decode row groups of one column, and keep the last few of all files together.

    One thread decodes while others wait for it. A pickle holds no decoded group.

    Args:
        paths: The Parquet files.
        column: The column of images: bytes, structs of bytes and path, or lists of either.
    """

    def __init__(self, paths: Sequence[Path], column: str) -> None:
        self.paths = tuple(paths)
        self.column = column
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, int], Any] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowGroups, (self.paths, self.column)

    def read(self, place: ParquetRow, key: str) -> bytes | str:
        """Return the bytes of one image, or its path; raises as `Media.read` does."""
        import pyarrow as pa

        try:
            value = self._column_of(place.file, place.group)[place.row].as_py()
        except (OSError, IndexError, pa.ArrowException) as error:
            path = self.paths[place.file]
            raise RowError("missing", f"{key}: {path}: {one_line(error)}") from None
        image = first_image(value)
        if image is None:
            raise RowError("missing", f"{key}: its row has no image")
        if isinstance(image, bytes):
            check_bytes(len(image), key)
        return image

    def sizes(self, file: int, group: int) -> list[int | None]:
        """Return the number of bytes of each image of a row group, None where a row has none.

        The list is empty for a group that cannot be decoded.
        """
        import pyarrow as pa
        from pyarrow import compute

        try:
            contents = image_fields(self._column_of(file, group))[0]
            return list(compute.binary_length(contents).to_pylist())
        except (OSError, IndexError, pa.ArrowException):
            return []

    def _column_of(self, file: int, group: int) -> Any:
        with self._lock:
            # The oldest group is dropped before the next is decoded, which limits the memory.
            if (file, group) not in self._kept:
                while len(self._kept) >= GROUPS_KEPT:
                    self._kept.popitem(last=False)
                self._kept[file, group] = _read_group(self.paths[file], group, self.column)
            self._kept.move_to_end((file, group))
            return self._kept[file, group]


def first_image(value: Any) -> bytes | str | None:
    """Return the bytes of an image, or its path; of a list, those of the first image."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value["path"] if value["bytes"] is None else value["bytes"]
    image: bytes | str | None = value
    return image


def is_list(column_type: Any) -> bool:
    """Return whether a type of Arrow is one of lists."""
    from pyarrow import types

    return bool(
        types.is_list(column_type)
        or types.is_large_list(column_type)
        or types.is_fixed_size_list(column_type)
    )


def image_fields(images: Any) -> tuple[Any, Any]:
    """Return the bytes and the paths of a column of images, as arrays of Arrow; paths may be None.

    Args:
        images: Bytes, structs of bytes and path, or lists of either, of which the first counts.
    """
    from pyarrow import compute, types

    if is_list(images.type):
        images = compute.list_element(_never_empty(images), 0)
    if types.is_struct(images.type):
        return compute.struct_field(images, "bytes"), compute.struct_field(images, "path")
    return images, None


def _never_empty(lists: Any) -> Any:
    """Replace empty lists by missing ones, whose first element is missing too."""
    from pyarrow import compute

    has_one = compute.greater(compute.list_value_length(lists), 0)
    return compute.if_else(has_one, lists, None)


def one_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _read_group(path: Path, group: int, column: str) -> Any:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(0)
