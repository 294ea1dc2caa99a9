"""Open folders of features of both sides, as clip-retrieval and `apecache export` write them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apecache.errors import DataError
from apecache.store.feature_files.arrow_file import open_arrow
from apecache.store.feature_files.numpy_file import open_npy
from apecache.store.feature_files.opened import FeatureFile, joined, joined_columns, natural_order

IMAGE_PARTS = "img_emb"
TEXT_PARTS = "text_emb"
METADATA_PARTS = "metadata"
EXPORT_IMAGES = "images.parquet"
EXPORT_TEXTS = "texts.parquet"


def is_clip_retrieval(folder: Path) -> bool:
    """Return whether a folder has embeddings of images or texts as clip-retrieval writes them."""
    return bool(_numbered(folder, IMAGE_PARTS) or _numbered(folder, TEXT_PARTS))


def is_parquet_export(folder: Path) -> bool:
    """Return whether `apecache export --parquet` wrote a folder."""
    return (folder / EXPORT_IMAGES).is_file() and (folder / EXPORT_TEXTS).is_file()


@dataclass(frozen=True, kw_only=True)
class EmbeddingFolder:
    """Hold the files of both sides, whose rows belong together."""

    image: FeatureFile | None
    text: FeatureFile | None
    metadata: FeatureFile | None
    """Columns of every row: paths, captions and others."""


def open_clip_retrieval(folder: Path) -> EmbeddingFolder:
    """Open the embeddings of images, those of texts, and the metadata of their rows.

    `img_emb/img_emb_0.npy` and `img_emb_0.npy` in the folder itself are both known.

    Raises:
        DataError: The parts of one side are not those of the other, so that rows would not belong
            together.
    """
    images = _numbered(folder, IMAGE_PARTS)
    texts = _numbered(folder, TEXT_PARTS)
    metadata = _numbered(folder, METADATA_PARTS)
    # Either side may be missing: clip-retrieval can write images or texts alone.
    first = images or texts
    for name, paths_of_side in ((TEXT_PARTS, texts), (METADATA_PARTS, metadata)):
        if paths_of_side and _numbers(paths_of_side) != _numbers(first):
            differing = sorted(set(_numbers(paths_of_side)) ^ set(_numbers(first)))
            raise DataError(
                f"{folder}: parts {', '.join(map(str, differing[:5]))} are only in one of "
                f"{first[0].parent.name} and {name}; copy the folder again"
            )
    image_file = _joined_parts(images, f"{folder}/{IMAGE_PARTS}")
    text_file = _joined_parts(texts, f"{folder}/{TEXT_PARTS}")
    rows = None
    if metadata:
        rows = joined_columns([open_arrow(path) for path in metadata], f"{folder}/metadata")
    return EmbeddingFolder(image=image_file, text=text_file, metadata=rows)


def _joined_parts(paths: Sequence[Path], origin: str) -> FeatureFile | None:
    return joined([open_npy(path) for path in paths], origin) if paths else None


def _numbered(folder: Path, name: str) -> list[Path]:
    """Return the parts `NAME_0.…`, `NAME_1.…`, in order of their numbers."""
    suffix = ".parquet" if name == METADATA_PARTS else ".npy"
    pattern = re.compile(rf"{name}_?\d+{re.escape(suffix)}")
    for parent in (folder / name, folder):
        if parent.is_dir():
            paths = [path for path in parent.iterdir() if pattern.fullmatch(path.name)]
            if paths:
                return sorted(paths, key=natural_order)
    return []


def _numbers(paths: Sequence[Path]) -> list[int]:
    return [int(re.findall(r"\d+", path.stem)[-1]) for path in paths]
