"""Export the embeddings of a store's images and captions, for vector databases and maps.

Every row has the key and path of its image, caption, split, label, language and its L2-normalized
vector as a list of fixed size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import DataError, MissingExtraError, OptionError, nearest, require_new
from apecache.evaluate.embeddings import Embeddings, OpenImage, RunSides, embed_store
from apecache.evaluate.left_out import LeftOut
from apecache.storage.replace import new_folder, replace_text
from apecache.store.reader import FeatureStore

EmbeddingFormat = Literal["parquet", "clip-retrieval", "lance"]
EMBEDDING_FORMATS: tuple[EmbeddingFormat, ...] = get_args(EmbeddingFormat)
BATCH_ROWS = 8192
"""Rows of a row group: vectors of 512 values are 16 MiB."""
PART_ROWS = 1_000_000
"""Rows of a part in clip-retrieval's layout."""


PARQUET_CARD = """---
configs:
- config_name: images
  data_files: images.parquet
- config_name: texts
  data_files: texts.parquet
---
Embeddings written by `apecache export-embeddings`. Vectors are L2-normalized float32.
Open a table with `datasets.load_dataset(FOLDER, "images")`.
"""
"""Tells `datasets`, and the Hugging Face hub, that the tables have different columns."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingsReport:
    """Say what an export of embeddings wrote."""

    out: Path
    files: tuple[str, ...]
    """Names below `out`, sorted."""
    n_images: int
    n_texts: int
    dim: int
    left_out: LeftOut


def export_embeddings(
    run: RunSides,
    store: FeatureStore,
    out: AnyPath,
    to: EmbeddingFormat = "parquet",
    split: str | None = None,
    open_image: OpenImage | None = None,
) -> EmbeddingsReport:
    """Embed the images and captions of a store and write them into a new folder.

    `parquet`: `images.parquet` and `texts.parquet`, one row per image and per caption.
    `clip-retrieval`: `img_emb/img_emb_N.npy`, `text_emb/text_emb_N.npy` and
    `metadata/metadata_N.parquet`, one row per pair, so an image with five captions has five rows.
    `lance`: the tables of `parquet` as `images.lance` and `texts.lance`.

    Args:
        run: run of either trainer.
        store: complete store with features of the run's encoders.
        out: folder, which must not exist or be empty.
        to: format.
        split: only this one; None: all.
        open_image: reads the image of a key, for runs whose image tower was trained.

    Raises:
        OptionError: an unknown format.
        RunError: `out` is not empty.
        MissingExtraError: pyarrow or lance is not installed.
        MismatchError: the store has no features of the run's encoders.
        DataError: no such split, or nothing in it.
    """
    require_type(store, FeatureStore, "store")
    out = as_path(out, "out")
    if to not in EMBEDDING_FORMATS:
        formats = ", ".join(EMBEDDING_FORMATS)
        raise OptionError(f"--to {to}: expected one of {formats}{nearest(to, EMBEDDING_FORMATS)}")
    # Before the embedding, which may take hours.
    require_new(out, "folder", remedy="give the name of a new folder")
    arrow = _pyarrow()
    lance = _lance() if to == "lance" else None
    embedded = embed_store(
        run,
        store=store,
        split=split,
        open_image=open_image,
        # clip-retrieval's rows are pairs, so an image without a caption has no row there.
        uncaptioned=to != "clip-retrieval",
    )
    with new_folder(out.absolute()) as scratch:
        if to == "clip-retrieval":
            _write_pairs(arrow, store, embedded, scratch)
        else:
            for name in ("images", "texts"):
                batches = _batches(arrow, store, embedded, name)
                if lance is not None:
                    table = arrow.Table.from_batches(list(batches))
                    lance.write_dataset(table, str(scratch / f"{name}.lance"))
                else:
                    _write_parquet(arrow, batches, scratch / f"{name}.parquet")
        if to == "parquet":
            replace_text(scratch / "README.md", PARQUET_CARD)
    return EmbeddingsReport(
        out=out,
        files=tuple(sorted(path.relative_to(out.absolute()).as_posix() for path in _files(out))),
        n_images=len(embedded.image),
        n_texts=len(embedded.text),
        dim=embedded.image.shape[1],
        left_out=embedded.left_out,
    )


def _files(out: Path) -> Iterator[Path]:
    return (path for path in out.absolute().rglob("*") if path.is_file())


def _pyarrow() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet  # the submodule is used below as an attribute
    except ImportError:
        raise MissingExtraError("pyarrow", "parquet") from None
    return pa


def _lance() -> ModuleType:
    try:
        import lance
    except ImportError:
        raise MissingExtraError("lance", "lance") from None
    module: ModuleType = lance
    return module


def _write_parquet(arrow: Any, batches: Iterator[Any], path: Path) -> None:
    # The schema is known with the first batch only.
    writer = None
    try:
        for batch in batches:
            if writer is None:
                writer = arrow.parquet.ParquetWriter(path, batch.schema, compression="zstd")
            writer.write_batch(batch)
    finally:
        if writer is not None:
            writer.close()


def _batches(
    arrow: Any,
    store: FeatureStore,
    embedded: Embeddings,
    name: str,
) -> Iterator[Any]:
    """Yield record batches of one table; at least one, which then may be empty."""
    is_image = name == "images"
    vectors = (embedded.image if is_image else embedded.text).cpu().numpy()
    for first in range(0, max(1, len(vectors)), BATCH_ROWS):
        block = vectors[first : first + BATCH_ROWS]
        rows = (embedded.image_rows if is_image else embedded.text_rows)[first : first + BATCH_ROWS]
        # Batch by batch: the strings of all rows would take more memory than the vectors.
        columns = _columns(store, rows, is_image)
        arrays = {key: arrow.array(values, arrow.string()) for key, values in columns.items()}
        flat = arrow.array(block.reshape(-1), arrow.float32())
        arrays["vector"] = arrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
        yield arrow.RecordBatch.from_pydict(arrays)


def _columns(store: FeatureStore, rows: NDArray[np.int64], is_image: bool) -> dict[str, list[str]]:
    """Return the columns of strings of images or captions (rows of the store)."""
    pairs = store.pairs
    image_rows = rows if is_image else pairs.image_rows[rows]
    keys = [str(key) for key in pairs.keys[image_rows]]
    root = store.source.get("root", "")
    columns = {"key": keys, "path": [_path(root, key) for key in keys]}
    if not is_image:
        columns["caption"] = [str(caption) for caption in pairs.captions[rows]]
        columns["language"] = [str(language) for language in pairs.languages[rows]]
    columns["split"] = [str(split) for split in pairs.splits[image_rows]]
    columns["label"] = [str(label) for label in pairs.labels[image_rows]]
    return columns


def _path(root: str, key: str) -> str:
    """Return the place of an image: its key below the root that the store was made from."""
    # Keys that are whole paths or URLs do not depend on the root.
    is_whole = "://" in key or key.startswith("/")
    return key if is_whole or not root else f"{root.rstrip('/')}/{key}"


def _write_pairs(arrow: Any, store: FeatureStore, embedded: Embeddings, out: Path) -> None:
    """Write clip-retrieval's layout: row i of images, texts and metadata are one pair."""
    if not len(embedded.text):
        raise DataError(f"{store.path} has no captions, so there are no pairs; use --to parquet")
    for folder in ("img_emb", "text_emb", "metadata"):
        (out / folder).mkdir()
    image = embedded.image.cpu().numpy()
    text = embedded.text.cpu().numpy()
    # The vector of an image stands beside each of its captions.
    owners = embedded.image_of_text.cpu().numpy()
    for part_number, first in enumerate(range(0, len(text), PART_ROWS)):
        rows = slice(first, first + PART_ROWS)
        np.save(out / "img_emb" / f"img_emb_{part_number}.npy", image[owners[rows]])
        np.save(out / "text_emb" / f"text_emb_{part_number}.npy", text[rows])
        columns = _columns(store, embedded.text_rows[rows], is_image=False)
        # clip-retrieval's back end shows a column of this name.
        columns = {"image_path": columns.pop("path"), **columns}
        table = arrow.table(columns)
        arrow.parquet.write_table(table, out / "metadata" / f"metadata_{part_number}.parquet")
