"""Open any kind of source as one `PairSource`.

The path of a source decides its kind; one module reads each family of kinds.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from apecache.arguments import AnyPath, as_place, require_spec
from apecache.data.annotations import open_annotations
from apecache.data.folders import open_folder
from apecache.data.frames import is_frame, open_frame
from apecache.data.further_columns import require_column_names
from apecache.data.hub import PREFIX, is_dataset, open_dataset, open_hub
from apecache.data.media import FolderMedia, NoMedia, ObjectMedia, base_media, moved_media
from apecache.data.pairs import PairSource
from apecache.data.parquet import open_parquet, parts_of
from apecache.data.paths import expand_paths
from apecache.data.shards import open_shards
from apecache.data.spec import OpenSpec, is_url, kind_of, recorded_options
from apecache.data.splits import resplit
from apecache.data.tables import open_table, open_tables
from apecache.data.texts import open_texts
from apecache.data.tfrecords import open_tfrecords
from apecache.errors import (
    ManifestError,
    MissingExtraError,
    OptionError,
    naming,
    nearest,
    nearest_sibling,
)
from apecache.storage.bucket import is_object_url, open_bucket

TABLE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson")
TEXT_SUFFIXES = (".txt", ".token")
REMOTE_SUFFIXES = (*TABLE_SUFFIXES, ".parquet", ".json", *TEXT_SUFFIXES)
SUFFIXES = (*TABLE_SUFFIXES, ".parquet", ".json", ".tar", ".tfrecord", *TEXT_SUFFIXES)


def open_pairs(uri: AnyPath | Any, spec: OpenSpec | None = None) -> PairSource:
    """Open a source of images, captions or both, and check all of it that is not an image.

    Args:
        uri: A table (.tsv, .csv, .jsonl, .ndjson, also .gz or .zst; .parquet), captions of COCO or
            Karpathy or a list of objects (.json), captions alone (.txt), tars (.tar), several
            tars, Parquet files or tables (`{00000..00012}.tar`, `*.parquet`), a folder (of tars,
            of Parquet files, of images with metadata.csv, with texts beside them, of a folder per
            class, of images), or `hf-datasets:` and a folder or name. A table may be on object
            storage (`s3://BUCKET/…`), with its images below the same folder unless `spec.root` is
            another one. From Python also a `datasets.Dataset` or `DatasetDict`, or a frame of
            pandas or Polars.
        spec: Columns, splits and other choices; None for the defaults.

    Raises:
        ManifestError: The source cannot be opened; the message has the line and what repairs it.
        OptionError: This kind of source cannot follow an option.
        MissingExtraError: A library is missing.
    """
    require_spec(spec, OpenSpec, "spec", optional=True)
    spec = spec or OpenSpec()
    if is_frame(uri):
        return _finished(spec, partial(open_frame, uri))
    if is_dataset(uri):
        return _finished(spec, partial(open_dataset, uri))
    source_place = as_place(uri, "uri")
    if not spec.restval and kind_of(source_place) != ".json":
        raise OptionError(f"{source_place}: --no-restval is for Karpathy's JSON; leave it out")
    return _finished(spec, partial(open_unsplit, source_place))


def open_unsplit(uri: AnyPath, spec: OpenSpec) -> PairSource:
    """Open a source for its images alone; raises as `open_pairs` does."""
    try:
        return _open(str(as_place(uri, "source")), spec)
    except OSError as error:
        if isinstance(error, ManifestError | MissingExtraError):
            raise
        raise ManifestError(
            f"{uri}: {error.strerror or error}; expected a source that can be read"
        ) from None


def _finished(spec: OpenSpec, opened: Callable[[OpenSpec], PairSource]) -> PairSource:
    """Open and check a source, and give it the splits and rules of the spec."""
    require_column_names(spec)
    source = opened(spec)
    _require(source, spec)
    source = replace(source, pixels=spec.pixels, options=recorded_options(spec))
    return resplit(source, spec)


def _open(uri: str, spec: OpenSpec) -> PairSource:
    if uri.startswith(PREFIX):
        return open_hub(uri, spec)
    if uri == "-":
        raise ManifestError(
            "standard input cannot be read again to go on after a kill; save it as a file and "
            "give that"
        )
    if is_object_url(uri):
        return _open_object(uri, spec)
    if is_url(uri):
        raise ManifestError(
            f"{uri}: a URL, and nothing is downloaded; download it and give the file"
        )
    path = Path(uri)
    # A file whose name has braces comes before a range of files.
    paths = None if path.exists() else expand_paths(uri)
    if paths is not None:
        return _open_files(paths, uri, spec)
    if path.is_dir():
        return open_folder(path, spec)
    _require_file(path)
    match kind_of(path):
        case ".parquet":
            return open_parquet(parts_of([path], uri), spec)
        case ".json":
            return open_annotations(path, spec)
        case ".tar":
            return open_shards([path], uri, spec)
        case ".tfrecord":
            return open_tfrecords([path], uri, spec)
        case ".txt" | ".token":
            return open_texts(path, spec)
        case _:
            return open_table(path, spec)


def _open_files(paths: Sequence[Path], uri: str, spec: OpenSpec) -> PairSource:
    """Open several files as one source.

    Raises:
        ManifestError: They are of several kinds, or of one that cannot be joined.
    """
    kinds = sorted({kind_of(path) for path in paths})
    if kinds == [".tar"]:
        return open_shards(paths, uri, spec)
    for path in paths:
        _require_file(path)
    if kinds == [".parquet"]:
        return open_parquet(parts_of(paths, uri), spec)
    if kinds == [".tfrecord"]:
        return open_tfrecords(paths, uri, spec)
    if set(kinds) <= set(TABLE_SUFFIXES):
        return open_tables(paths, uri, spec)
    if len(paths) == 1:
        return _open(str(paths[0]), spec)
    raise ManifestError(
        f"{uri}: files that end in {', '.join(kinds)}; expected tars, Parquet files or tables alone"
    )


def _open_object(url: str, spec: OpenSpec) -> PairSource:
    """Fetch a table on object storage, and open it."""
    if kind_of(url) not in REMOTE_SUFFIXES:
        expected = f"on object storage expected a file that ends in {', '.join(REMOTE_SUFFIXES)}"
        raise ManifestError(f"{url}: {expected}; give a table, or download tars and folders")
    bucket, key = open_bucket(url)
    with tempfile.TemporaryDirectory() as folder:
        # The name has the ending, which may be two: .csv.gz
        path = Path(folder) / url.rpartition("/")[2]
        try:
            path.write_bytes(bucket.read(key))
        except FileNotFoundError:
            raise ManifestError(f"{url}: no such object; give another") from None
        with naming(url, path):
            source = _open(str(path), spec)
    base = base_media(source.media)
    if isinstance(base, FolderMedia) and spec.root is None:
        objects = ObjectMedia(url.rpartition("/")[0])
        return replace(source, origin=url, media=moved_media(source.media, objects))
    if not isinstance(base, FolderMedia | ObjectMedia | NoMedia):
        raise ManifestError(
            f"{url}: its images stand in the file itself, and are read in place; download it"
        )
    return replace(source, origin=url)


def _require_file(path: Path) -> None:
    suffix = kind_of(path)
    if suffix not in SUFFIXES and (path.exists() or suffix):
        expected = f"expected a file that ends in {', '.join(SUFFIXES)}, or a folder"
        raise ManifestError(f"{path}: {expected}{nearest(suffix, SUFFIXES)}")
    if not path.exists():
        raise ManifestError(f"{path}: no such file{nearest_sibling(path)}")
    if not path.is_file():
        raise ManifestError(
            f"{path}: a device or pipe; expected a file that ends in {', '.join(SUFFIXES)}"
        )


def _require(source: PairSource, spec: OpenSpec) -> None:
    """Check that the source has the required roles; single rows may lack them."""
    has = {"image": bool(source.media.place), "caption": bool(source.captions)}
    has["label"] = any(pair.label for pair in source)
    for role in spec.require:
        if not has[role]:
            present_roles = (
                ", ".join(f"{name}s" for name, is_present in has.items() if is_present) or "nothing"
            )
            raise ManifestError(
                f"{source.origin} has no {role}s, only {present_roles}; {NAME_ROLE[role]}"
            )


NAME_ROLE = {
    "image": "give a source that has them, or name their column with --image-column",
    "caption": "put a .txt beside each image, give a table of images and captions, or name the "
    "column with --caption-column",
    "label": "give a folder per class, or name the column with --label-column",
}
"""What mends a source that lacks a role."""
