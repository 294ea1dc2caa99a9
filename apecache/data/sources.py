"""Open any kind of source as one `PairSource`.

The path of a source decides its kind; one module reads each family of kinds.
"""

import tempfile
from dataclasses import replace
from pathlib import Path

from apecache.arguments import AnyPath, as_place, require_spec
from apecache.data.annotations import open_annotations
from apecache.data.folders import open_folder
from apecache.data.hub import PREFIX, open_hub
from apecache.data.media import FolderMedia, NoMedia, ObjectMedia
from apecache.data.pairs import PairSource
from apecache.data.parquet import open_parquet
from apecache.data.shards import brace_paths, open_shards
from apecache.data.spec import OpenSpec, is_url
from apecache.data.splits import resplit
from apecache.data.tables import open_table
from apecache.data.texts import open_texts
from apecache.errors import ManifestError, OptionError, naming, nearest, nearest_sibling
from apecache.storage.bucket import is_object_url, open_bucket

REMOTE_SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet", ".json", ".txt")
SUFFIXES = (".tsv", ".csv", ".jsonl", ".parquet", ".json", ".tar", ".txt")


def open_pairs(uri: AnyPath, spec: OpenSpec | None = None) -> PairSource:
    """Open a source of images, captions or both, and check all of it that is not an image.

    Args:
        uri: A table (.tsv, .csv, .jsonl, .parquet), captions of COCO or Karpathy (.json), captions
            alone (.txt), tars (.tar, `{00000..00012}.tar`), a folder (of tars, of images with
            metadata.csv, of a folder per class, of images), or `hf-datasets:` and a folder or name.
            A file of one of the first three kinds may be on object storage (`s3://BUCKET/…`), with
            its images below the same folder unless `spec.root` is another one.
        spec: Columns, splits and other choices; None for the defaults.

    Raises:
        ManifestError: The source cannot be opened; the message has the line and what repairs it.
        OptionError: This kind of source cannot follow an option.
        MissingExtraError: A library is missing.
    """
    uri = as_place(uri, "uri")
    require_spec(spec, OpenSpec, "spec", optional=True)
    spec = spec or OpenSpec()
    if not spec.restval and Path(uri).suffix.lower() != ".json":
        raise OptionError(f"{uri}: --no-restval is for Karpathy's JSON; leave it out")
    try:
        source = _open(str(uri), spec)
    except OSError as error:
        if isinstance(error, ManifestError):
            raise
        raise ManifestError(
            f"{uri}: {error.strerror or error}; expected a source that can be read"
        ) from None
    _require(source, spec)
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
    # A file whose name has braces comes before a range of tars.
    tars = None if path.exists() else brace_paths(uri)
    if tars is not None:
        return open_shards(tars, uri, spec)
    if path.is_dir():
        return open_folder(path, spec)
    _require_file(path)
    match path.suffix.lower():
        case ".parquet":
            return open_parquet(path, spec)
        case ".json":
            return open_annotations(path, spec)
        case ".tar":
            return open_shards([path], str(path), spec)
        case ".txt":
            return open_texts(path, spec)
        case _:
            return open_table(path, spec)


def _open_object(url: str, spec: OpenSpec) -> PairSource:
    """Fetch a table on object storage, and open it."""
    suffix = Path(url).suffix.lower()
    if suffix not in REMOTE_SUFFIXES:
        expected = f"on object storage expected a file that ends in {', '.join(REMOTE_SUFFIXES)}"
        raise ManifestError(f"{url}: {expected}; give a table, or download tars and folders")
    bucket, key = open_bucket(url)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"table{suffix}"
        try:
            path.write_bytes(bucket.read(key))
        except FileNotFoundError:
            raise ManifestError(f"{url}: no such object; give another") from None
        with naming(url, path):
            source = _open(str(path), spec)
    if isinstance(source.media, FolderMedia) and spec.root is None:
        return replace(source, origin=url, media=ObjectMedia(url.rpartition("/")[0]))
    if not isinstance(source.media, FolderMedia | ObjectMedia | NoMedia):
        raise ManifestError(
            f"{url}: its images stand in the file itself, and are read in place; download it"
        )
    return replace(source, origin=url)


def _require_file(path: Path) -> None:
    suffix = path.suffix.lower()
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
                f"{source.origin} has no {role}s, only {present_roles}; give a source that has them"
            )
