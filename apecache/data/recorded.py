"""Read the images of a store again, from the source that the store recorded.

A source record has the source's name (`origin`), the folder of its images (`root`) and the options
it was opened with. Images in a folder are read from there. All others come with their source, which
is opened again: tars, Parquet files, data sets, and images under other names.
"""

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from PIL import Image

from apecache.arguments import AnyPath
from apecache.data.hub import PREFIX
from apecache.data.images import DEFAULT_RULES, load_image
from apecache.data.media import (
    FolderMedia,
    Media,
    NoMedia,
    ObjectMedia,
    RenamedMedia,
    RuledMedia,
    base_media,
    media_at,
    media_below,
    moved_media,
)
from apecache.data.pairs import PairSource
from apecache.data.paths import expand_paths
from apecache.data.sources import open_unsplit
from apecache.data.spec import OpenSpec, spec_of_options
from apecache.errors import ManifestError, MissingExtraError, OptionError, naming
from apecache.fingerprint import Json

MEDIA = "media"
WORKING_FOLDER = "working_folder"


def options_to_record(source: PairSource) -> dict[str, Json]:
    """Return what a store records to read the images of a source again."""
    # The folder of the images has a field of its own.
    options = {name: value for name, value in source.options.items() if name != "root"}
    # A source that was made of a record already says where its name begins.
    folder = options.get(WORKING_FOLDER, os.getcwd())
    return {**options, MEDIA: type(source.media).__name__, WORKING_FOLDER: folder}


def recorded_media(
    record: Mapping[str, Any],
    root: AnyPath | None = None,
    source: AnyPath | None = None,
) -> Media:
    """Return the media of the source that a store recorded; `NoMedia` if it is not there any more.

    Args:
        record: The store's record of its source.
        root: New folder of the images.
        source: New name of the source, for images that come with it.

    Raises:
        ManifestError: The source that is given cannot be opened.
    """
    options: Mapping[str, Json] = record.get("options", {})
    # The store has the further columns, and the images do not need them.
    spec = replace(spec_of_options(options), columns=())
    media_type = options.get(MEDIA, FolderMedia.__name__)
    if source is not None:
        media = open_unsplit(source, replace(spec, root=root or spec.root)).media
    elif root is not None and media_type != RenamedMedia.__name__:
        media = media_below(root, spec.allow_root)
    elif media_type in (FolderMedia.__name__, ObjectMedia.__name__):
        media = media_at(str(record.get("root", "")), spec.allow_root)
    else:
        media = _reopened(record, spec, root)
    rules = spec.pixels
    if rules == DEFAULT_RULES or isinstance(media, NoMedia):
        return media
    return RuledMedia(media=media, rules=rules)


def recorded_column(
    record: Mapping[str, Any],
    column: str,
    source: AnyPath | None = None,
    option: str = "--by",
) -> dict[str, str]:
    """Read a column of the table that a store recorded.

    Args:
        record: The store's record of its source.
        column: Name of the column.
        source: New name of the source.
        option: What asked for the column, for messages.

    Returns:
        Value by key of the image; empty where the table has none.

    Raises:
        ManifestError: The table cannot be opened, has no such column, or several values for one
            image.
        OptionError: This kind of source has no columns.
    """
    spec = replace(spec_of_options(record.get("options", {})), columns=(column,))
    with naming(option, "--column"):
        opened = open_unsplit(_present_origin(record) if source is None else source, spec)
    return dict(opened.columns[column])


def _reopened(record: Mapping[str, Any], spec: OpenSpec, root: AnyPath | None) -> Media:
    """Return the media of the recorded source; `NoMedia` if it cannot be opened."""
    try:
        media = open_unsplit(_present_origin(record), spec).media
    except (ManifestError, MissingExtraError):
        media = NoMedia()
    if not isinstance(base_media(media), FolderMedia | ObjectMedia):
        return media
    media_root = root or str(record.get("root", ""))
    return moved_media(media, media_below(media_root, spec.allow_root))


def _present_origin(record: Mapping[str, Any]) -> str:
    """Return the name of the recorded source: the first that is there, else the last possible.

    A relative path begins in the folder of the extraction, or in that of this command.
    """
    origin = str(record.get("origin", ""))
    prefix, path = "", origin
    if origin.startswith(PREFIX):
        prefix, path = PREFIX, origin.removeprefix(PREFIX)
    is_name = bool(prefix) and not path.startswith(("./", "../"))
    if is_name or os.path.isabs(path):
        return origin
    folder = str(record.get("options", {}).get(WORKING_FOLDER, "."))
    in_folder = os.path.join(folder, path)
    return prefix + in_folder if _is_present(in_folder) else origin


def _is_present(path: str) -> bool:
    """Tell whether a file or folder exists, or any file of a range of files."""
    if os.path.exists(path):
        return True
    try:
        paths = expand_paths(path)
    except ManifestError:
        return False
    return any(found.exists() for found in paths or ())


class RecordedImages:
    """Open images of a store by their keys; the source is opened when the first one is read.

    Threads may share it.

    Args:
        record: The store's record of its source; None if there is no store.
        root: New folder of the images.
        source: New name of the source.
    """

    def __init__(
        self,
        record: Mapping[str, Any] | None,
        root: AnyPath | None = None,
        source: AnyPath | None = None,
    ) -> None:
        self.record = record or {}
        self.root = root
        self.source = source
        self._lock = threading.Lock()
        self._media: Media | None = None

    def __call__(self, key: str) -> Image.Image:
        """Return an image.

        Raises:
            OptionError: The images are not where the store recorded them.
            ManifestError: The source that is given cannot be opened.
            RowError: The image cannot be read.
        """
        return load_image(key, self.media).image

    def require(self) -> None:
        """Open the source now; raises as a call does."""
        assert self.media is not None

    @property
    def media(self) -> Media:
        """Return what reads the images; raises as a call does."""
        with self._lock:
            if self._media is None:
                self._media = recorded_media(self.record, root=self.root, source=self.source)
        if isinstance(self._media, NoMedia):
            origin = self.record.get("origin", "the source")
            raise OptionError(
                f"the image tower runs, so it needs the images, and {origin} is not where the "
                "store recorded it; give its new place with --source, or the folder of the images "
                "with --root"
            )
        return self._media
