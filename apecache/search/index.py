"""Build and update a searchable index of embeddings.

The index holds the run that made it, so it can encode queries by itself.

INDEX/index.json                  what is in it, of which run, and how each set was built
INDEX/head.json, head.safetensors (or encoder.…, of a run of fit-encoder)
INDEX/images.faiss, texts.faiss   inner product of L2-normalized vectors: cosine
INDEX/images.jsonl, texts.jsonl   keys and captions, in the order of the vectors; with the
                                  hash of each image's file
"""

import json
import logging
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import (
    MismatchError,
    OptionError,
    RunError,
    require_new,
)
from apecache.evaluate.embeddings import (
    Allocate,
    Embeddings,
    OpenImage,
    embed_store,
)
from apecache.evaluate.left_out import LeftOut
from apecache.fingerprint import Modality
from apecache.runs.load import Run, copy_run, load_run
from apecache.search.calibrate import nothing_found_score
from apecache.search.columns import ColumnValues, read_columns
from apecache.search.exact import Floats, shortened
from apecache.search.faiss_index import (
    KindReport,
    VectorIndex,
    allocate_flat,
    build_vectors,
    load_faiss,
    measured,
    open_vectors,
)
from apecache.search.index_files import (
    FORMAT_VERSION,
    PARTS,
    Part,
    Row,
    index_rows,
    kind_of,
    read_description,
    read_report,
    read_rows,
    row_identity,
    write_rows,
)
from apecache.storage.replace import replace_text
from apecache.store.reader import FeatureStore

logger = logging.getLogger(__name__)

Fill = Callable[[Part, Floats, Sequence[Row]], tuple[VectorIndex, KindReport]]
"""Builds the index of one modality from its vectors and their rows."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """Say what of a store is in an index, and in which form."""

    split: str | None
    """Only this one; None: all."""
    kind: str
    dim: int | None
    """Values that are kept of each embedding; None: all."""
    columns: ColumnValues
    """Further columns of the table, whose values the rows have."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """Say what is in an index, and how it was built."""

    index: Path
    n_images: int
    n_texts: int
    dim: int
    kind: str
    images: KindReport
    """How the index of the images was built."""
    texts: KindReport
    """How the index of the captions was built."""
    n_added: int
    """Images and captions that were added."""
    n_removed: int = 0
    """Images and captions that were removed."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What of the split or store is not in the index."""


def build_index(
    run: AnyPath,
    store: FeatureStore,
    out: AnyPath,
    split: str | None = None,
    overwrite: bool = False,
    kind: str = "flat",
    open_image: OpenImage | None = None,
    dim: int | None = None,
    columns: Sequence[str] = (),
    source: AnyPath | None = None,
) -> IndexReport:
    """Embed a store's images and captions, and write an index folder, completely or not at all.

    Images without a caption are in the index too. The store needs no features of texts.

    Args:
        run: folder of a finished run.
        store: its features and captions.
        out: folder of the index.
        split: only this one. None: all.
        overwrite: replace an index at `out`.
        kind: as in `apecache.search.faiss_index`.
        open_image: as `embed_store` takes it.
        dim: keep the first values of each embedding, L2-normalized again. None: all.
        columns: of the store's table, whose values the rows have, for conditions of a search.
        source: the table, where it is not where the store recorded it.

    Raises:
        RunError: no finished run, or `out` exists.
        ManifestError: the table is not there, or has no such column.
        MismatchError: the store is not of the run's encoders.
        MissingExtraError: FAISS is not installed.
        OptionError: no such kind.
        DataError: too few vectors to train the kind.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    require_type(store, FeatureStore, "store")
    require_type(kind, str, "kind")
    # Checked before the embedding, which can take long.
    load_faiss()
    require_new(
        out,
        what="index",
        overwrite=overwrite,
        holds_another=(out / "index.json").is_file(),
    )
    loaded = load_run(run)
    if dim is not None and not 0 < dim <= loaded.image.dim:
        raise OptionError(f"--dim {dim}: the embeddings have {loaded.image.dim}; give 1 to that")
    settings = IndexSettings(
        split=split,
        kind=kind,
        dim=dim,
        columns=read_columns(store, columns, source),
    )
    flat_indexes: dict[Part, VectorIndex] = {}
    embedded = embed_store(
        loaded,
        store=store,
        split=split,
        open_image=open_image,
        uncaptioned=True,
        allocate=_flat_memory(settings, loaded.image.dim, flat_indexes),
    )

    def fill(
        modality: Part,
        vectors: Floats,
        rows: Sequence[Row],
    ) -> tuple[VectorIndex, KindReport]:
        return _filled_already(flat_indexes, modality) or build_vectors(kind, vectors)

    report = _write(
        out,
        run=run,
        loaded=loaded,
        store=store,
        embedded=embedded,
        settings=settings,
        fill=fill,
    )
    return replace(report, n_added=report.n_images + report.n_texts)


def update_index(
    run: AnyPath,
    store: FeatureStore,
    out: AnyPath,
    open_image: OpenImage | None = None,
    source: AnyPath | None = None,
) -> IndexReport:
    """Update an index to its store: add new rows and remove missing ones, by key.

    Kind, split and columns stay. No frozen encoder runs. An image is the same if its key and file
    are the same, a caption if its key and words are the same.

    Rows that follow those of the index are appended. After any other change the index is filled
    again in the order of the store, because FAISS's graphs cannot remove vectors. The trained state
    is kept, unless the vectors are now more than twice or less than half as many.

    Args:
        run: folder of the run that the index was built with.
        store: its features and captions.
        out: folder of the index.
        open_image: as `embed_store` takes it.
        source: the table, where it is not where the store recorded it.

    Raises:
        MismatchError: the index is of another head than the run.
        RunError: no index, or one that is damaged.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    require_type(store, FeatureStore, "store")
    description = read_description(out)
    loaded = load_run(run)
    require_head(description, loaded=loaded, out=out, run=run)
    settings = IndexSettings(
        split=description.get("split"),
        kind=kind_of(description),
        dim=description.get("dim"),
        columns=read_columns(store, description.get("columns", ()), source),
    )
    flat_indexes: dict[Part, VectorIndex] = {}
    embedded = embed_store(
        loaded,
        store=store,
        split=settings.split,
        open_image=open_image,
        uncaptioned=True,
        allocate=_flat_memory(settings, loaded.image.dim, flat_indexes),
    )
    added = Counter[tuple[str, str]]()
    removed = Counter[tuple[str, str]]()

    def fill(
        modality: Part,
        vectors: Floats,
        rows: Sequence[Row],
    ) -> tuple[VectorIndex, KindReport]:
        old = [row_identity(row) for row in read_rows(out, modality)]
        new = [row_identity(row) for row in rows]
        added.update(Counter(new) - Counter(old))
        removed.update(Counter(old) - Counter(new))
        report = read_report(description, modality)
        # An index without vectors is exact, so its kind is still to be built.
        if not old or not new:
            return build_vectors(kind_of(description), vectors)
        # Clusters that were trained on half as many vectors, or twice as many, fit no more.
        if report.trained_on and not report.trained_on / 2 <= len(new) <= 2 * report.trained_on:
            return build_vectors(kind_of(description), vectors)
        filled = _filled_already(flat_indexes, modality)
        # Read and not mapped where vectors change: the old file is deleted.
        index = open_vectors(
            out / f"{modality}.faiss",
            factory=report.factory,
            mmap=filled is not None,
        )
        if index.shape != (len(old), vectors.shape[1]):
            raise RunError(
                f"{out}: {modality}.faiss does not fit {modality}.jsonl and the head; build the "
                "index again"
            )
        if filled is not None:
            return filled
        if new[: len(old)] == old:
            index.add(vectors[len(old) :])
        else:
            index.refill(vectors)
        return index, report

    report = _write(
        out,
        run=run,
        loaded=loaded,
        store=store,
        embedded=embedded,
        settings=settings,
        fill=fill,
    )
    return replace(report, n_added=added.total(), n_removed=removed.total())


def _flat_memory(
    settings: IndexSettings,
    full_dim: int,
    flat_indexes: dict[Part, VectorIndex],
) -> Allocate | None:
    """Return what gives embeddings the memory of an exact index, so that none is copied.

    Args:
        settings: Form of the index; None is returned for others than an exact one of whole vectors.
        full_dim: Values of a whole vector.
        flat_indexes: Gets the indexes.
    """
    if settings.kind != "flat" or settings.dim not in (None, full_dim):
        return None

    def allocate(modality: Modality, n: int, dim: int) -> Tensor:
        part: Part = "images" if modality == "image" else "texts"
        flat_indexes[part] = allocate_flat(n, dim)
        return torch.from_numpy(flat_indexes[part].flat_vectors)

    return allocate


def _filled_already(
    flat_indexes: Mapping[Part, VectorIndex],
    modality: Part,
) -> tuple[VectorIndex, KindReport] | None:
    """Return the index that the embeddings were written into; None if there is none."""
    if modality not in flat_indexes:
        return None
    report = KindReport(factory="Flat", trained_on=0, build_seconds=0.0)
    return flat_indexes[modality], report


def _write(
    out: Path,
    run: Path,
    loaded: Run,
    store: FeatureStore,
    embedded: Embeddings,
    settings: "IndexSettings",
    fill: Fill,
) -> IndexReport:
    """Write the folder of an index."""
    full_vectors: dict[Part, Floats] = {
        "images": np.ascontiguousarray(embedded.image.cpu()),
        "texts": np.ascontiguousarray(embedded.text.cpu()),
    }
    dim = settings.dim or embedded.image.shape[1]
    vectors = {side_name: _kept(values, dim) for side_name, values in full_vectors.items()}
    image_rows, text_rows = index_rows(store, loaded, embedded, settings.columns)
    rows: dict[Part, list[Row]] = {"images": image_rows, "texts": text_rows}
    reports: dict[Part, KindReport] = {}
    with _replacing(out) as folder:
        copy_run(run, folder)
        for modality, other in zip(PARTS, reversed(PARTS), strict=True):
            index, report = fill(modality, vectors[modality], rows[modality])
            # Images are mostly searched by texts and texts by images, so recall is measured so.
            reports[modality] = measured(
                report,
                built=index,
                vectors=full_vectors[modality],
                queries=full_vectors[other],
                dim=dim,
            )
            index.save(folder / f"{modality}.faiss")
            write_rows(folder / f"{modality}.jsonl", rows[modality])
        dimensions = {
            "n_images": len(rows["images"]),
            "n_texts": len(rows["texts"]),
            "dim": dim,
        }
        description = {
            "format": FORMAT_VERSION,
            "head": loaded.digest,
            "split": settings.split,
            "columns": list(settings.columns),
            "data": store.digest,
            "kind": settings.kind,
            "nothing_found": _thresholds(vectors, embedded),
            "place": store.source.get("root", ""),
            "source": store.last_source,
            **dimensions,
            "built": {modality: asdict(report) for modality, report in reports.items()},
        }
        replace_text(folder / "index.json", json.dumps(description, indent=1))
    logger.info("index %s: %d images, %d captions", out, len(image_rows), len(text_rows))
    return IndexReport(
        index=out,
        **dimensions,
        kind=settings.kind,
        images=reports["images"],
        texts=reports["texts"],
        n_added=0,
        left_out=embedded.left_out,
    )


def _kept(vectors: Floats, dim: int) -> Floats:
    """Return the values that the index keeps of each vector."""
    return vectors if dim == vectors.shape[1] else shortened(vectors, dim)


def _thresholds(vectors: Mapping[Part, Floats], embedded: Embeddings) -> dict[str, float | None]:
    """Return the score below which the best result of each modality is no answer."""
    owners = embedded.image_of_text.cpu().numpy()
    # An image is its own owner, a caption belongs to its image.
    images = np.arange(len(vectors["images"]))
    return {
        "images": nothing_found_score(
            vectors["images"],
            queries=vectors["texts"],
            owner_of_query=owners,
            owner_of_vector=images,
        ),
        "texts": nothing_found_score(
            vectors["texts"],
            queries=vectors["images"],
            owner_of_query=images,
            owner_of_vector=owners,
        ),
    }


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `out` on success, and is removed on an error."""
    # Beside `out`, so that the last rename stays on one file system.
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    former = out.with_name(f"{temporary.name}.former")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        # A folder cannot be renamed onto one that is not empty. The old one is renamed first, not
        # removed: a kill in between leaves both complete, beside `out`.
        if out.exists():
            os.replace(out, former)
        os.replace(temporary, out)
    finally:
        if former.exists() and not out.exists():
            os.replace(former, out)
        for leftover in (temporary, former):
            shutil.rmtree(leftover, ignore_errors=True)


def require_head(description: Mapping[str, Any], loaded: Run, out: Path, run: Path) -> None:
    """Require that the index at `out` was made with the heads of `run`.

    Raises:
        MismatchError: it was made with others.
    """
    index_head = str(description.get("head"))
    run_head = loaded.digest
    if index_head != run_head:
        message = (
            f"{out} is of the head {index_head[:16]}, {run} has {run_head[:16]}: build the index "
            "again with --overwrite"
        )
        raise MismatchError(message, [("head", run_head, index_head)])


def require_same(description: Mapping[str, Any], split: str | None, kind: str | None) -> None:
    """Require that an update keeps the split and kind of the index.

    Raises:
        OptionError: it asks for others.
    """
    for option, requested, recorded in (
        ("--split", split, description.get("split")),
        ("--kind", kind, kind_of(description)),
    ):
        if requested is not None and requested != recorded:
            raise OptionError(
                f"{option} {requested}: the index has {recorded}, and --update keeps it; leave "
                f"{option} out"
            )
