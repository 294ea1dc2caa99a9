"""A searchable index of embeddings, with the run that made it, so that it can encode queries by
itself.

INDEX/index.json                  what is in it, of which run, and how each set was built
INDEX/head.json, head.safetensors (or encoder.…, of a run of fit-encoder)
INDEX/images.faiss, texts.faiss   inner product of L2-normalised vectors: cosine
INDEX/images.jsonl, texts.jsonl   keys and captions, in the order of the vectors; with the
                                  hash of each image's file
"""

import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from apecache.arguments import AnyPath, as_path, require_type
from apecache.errors import MismatchError, OptionError, RunError, nearest, require_new
from apecache.evaluate.embeddings import Embeddings, OpenImage, embed_store, find_features
from apecache.evaluate.left_out import LeftOut
from apecache.runs.heads import TrainedSide
from apecache.runs.load import Run, copy_run, load_run
from apecache.search.faiss_index import (
    Floats,
    KindReport,
    VectorIndex,
    build_vectors,
    load_faiss,
    measured,
    open_vectors,
)
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable

FORMAT_VERSION = 1
Part = Literal["images", "texts"]
PARTS: tuple[Part, ...] = ("images", "texts")
Row = Mapping[str, str]
Fill = Callable[[Part, Floats, Sequence[Row]], tuple[VectorIndex, KindReport]]
"""Makes the index of one part out of its vectors and their rows."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """`images` and `texts` say how they were built. `n_added`, `n_removed`: images and captions
    together."""

    index: Path
    n_images: int
    n_texts: int
    dim: int
    kind: str
    images: KindReport
    texts: KindReport
    n_added: int
    n_removed: int = 0
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
) -> IndexReport:
    """Embed a store's images and captions (of one split, or all) and write an index folder, whole
    or not at all. Images without a caption are in it too, and the store needs no features of texts.

    `kind`: as in `apecache.search.faiss_index`. `open_image`: as of `embed_store`.

    Raises:
        RunError: no finished run, or `out` exists. MismatchError: the store is not of the run's
            encoders.
        MissingExtraError: FAISS is not installed. OptionError: no such kind. DataError: too little
            to train it on.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    require_type(store, FeatureStore, "store")
    require_type(kind, str, "kind")
    load_faiss()
    if not ((out / "index.json").is_file() and overwrite):
        require_new(out, "index", overwrite)
    loaded = load_run(run)
    embedded = embed_store(
        loaded,
        store=store,
        split=split,
        open_image=open_image,
        uncaptioned=True,
    )
    made = (split, kind)
    report = _write(
        out,
        run=run,
        loaded=loaded,
        store=store,
        embedded=embedded,
        settings=made,
        fill=lambda _, vectors, rows: build_vectors(kind, vectors),
    )
    return replace(report, n_added=report.n_images + report.n_texts)


def update_index(
    run: AnyPath,
    store: FeatureStore,
    out: AnyPath,
    open_image: OpenImage | None = None,
) -> IndexReport:
    """Bring an index up to date with its store: rows that are new are added, rows that are gone
    removed, by key. No encoder runs that the run has left frozen; the kind and the split stay.

    An image is the same if key and file are, a caption if key and words are. Rows that follow those
    of the index are added to it. After any other change it is filled anew, in the order of the
    store, for FAISS's graphs can forget nothing; what it was trained on is kept unless there are
    now twice or half as many vectors.

    Raises:
        MismatchError: the index is of another head than the run. RunError: no index, or one that is
            damaged.
    """
    run = as_path(run, "run")
    out = as_path(out, "out")
    require_type(store, FeatureStore, "store")
    description = read_description(out)
    loaded = load_run(run)
    require_head(description, loaded=loaded, out=out, run=run)
    embedded = embed_store(
        loaded,
        store=store,
        split=description.get("split"),
        open_image=open_image,
        uncaptioned=True,
    )
    added = Counter[tuple[str, str]]()
    removed = Counter[tuple[str, str]]()

    def fill(part: Part, vectors: Floats, rows: Sequence[Row]) -> tuple[VectorIndex, KindReport]:
        old = [_identity(row) for row in read_rows(out, part)]
        new = [_identity(row) for row in rows]
        added.update(Counter(new) - Counter(old))
        removed.update(Counter(old) - Counter(new))
        report = read_report(description, part)
        if not old or not new:  # an index of no vectors is of no kind yet
            return build_vectors(kind_of(description), vectors)
        if report.trained_on and not report.trained_on / 2 <= len(new) <= 2 * report.trained_on:
            return build_vectors(kind_of(description), vectors)
        index = open_vectors(out / f"{part}.faiss", report.factory, mmap=False)
        if index.shape != (len(old), vectors.shape[1]):
            raise RunError(
                f"{out}: {part}.faiss does not fit {part}.jsonl and the head; build the index again"
            )
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
        settings=(description.get("split"), kind_of(description)),
        fill=fill,
    )
    return replace(report, n_added=added.total(), n_removed=removed.total())


def _write(
    out: Path,
    run: Path,
    loaded: Run,
    store: FeatureStore,
    embedded: Embeddings,
    settings: tuple[str | None, str],
    fill: Fill,
) -> IndexReport:
    split, kind = settings
    vectors = {
        part: np.ascontiguousarray(v.cpu())
        for part, v in zip(PARTS, (embedded.image, embedded.text), strict=True)
    }
    rows = dict(zip(PARTS, _rows(store, loaded, embedded), strict=True))
    reports: dict[Part, KindReport] = {}
    with _replacing(out) as folder:
        copy_run(run, folder)
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            index, report = fill(part, vectors[part], rows[part])
            reports[part] = measured(
                report,
                built=index,
                vectors=vectors[part],
                queries=vectors[other],
            )
            index.save(folder / f"{part}.faiss")
            _write_rows(folder / f"{part}.jsonl", rows[part])
        counts = {
            "n_images": len(rows["images"]),
            "n_texts": len(rows["texts"]),
            "dim": embedded.image.shape[1],
        }
        description = {
            "format": FORMAT_VERSION,
            "head": loaded.digest,
            "split": split,
            "data": store.digest,
            "kind": kind,
            "place": store.source.get("root", ""),
            **counts,
            "built": {part: asdict(report) for part, report in reports.items()},
        }
        (folder / "index.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
    return IndexReport(
        index=out,
        **counts,
        kind=kind,
        images=reports["images"],
        texts=reports["texts"],
        n_added=0,
        left_out=embedded.left_out,
    )


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A new folder that takes the place of `out` when all went well, and is gone when it did
    not."""
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rows(store: FeatureStore, run: Run, embedded: Embeddings) -> tuple[list[Row], list[Row]]:
    """For each image its key, its first usable caption (empty without one) and the hash of its
    file; for each caption key and words."""
    pairs = store.pairs
    content = _content(store, run)
    owners = pairs.image_rows[embedded.text_rows]
    first = {int(i): t for t, i in reversed(list(zip(embedded.text_rows, owners, strict=True)))}
    images: list[Row] = [
        {"key": pairs.keys[i], "caption": _caption(pairs, first.get(int(i))), "content": content[i]}
        for i in embedded.image_rows
    ]
    texts: list[Row] = [
        {"key": pairs.keys[i], "caption": pairs.captions[t]}
        for t, i in zip(embedded.text_rows, owners, strict=True)
    ]
    return images, texts


def _caption(pairs: PairTable, row: int | None) -> str:
    return "" if row is None else str(pairs.captions[row])


def _content(store: FeatureStore, run: Run) -> list[str]:
    """Hash of each image's file, as it was when the store's features were made; empty where the
    store has none."""
    if isinstance(run.image, TrainedSide):
        return find_features(run.image, store, "image").content()
    arrays = store.arrays("image")
    return arrays[0].content() if arrays else [""] * len(store.pairs.keys)


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _identity(row: Row) -> tuple[str, str]:
    return row["key"], row.get("content", row["caption"])


def require_head(description: Mapping[str, Any], loaded: Run, out: Path, run: Path) -> None:
    """Raises MismatchError unless the index at `out` was made with the heads of `run`."""
    found = str(description.get("head"))
    there = loaded.digest
    if found != there:
        raise MismatchError(
            (
                f"{out} is of the head {found[:16]}, {run} has {there[:16]}: build the index "
                "again with --overwrite"
            ),
            [("head", there, found)],
        )


def require_same(description: Mapping[str, Any], split: str | None, kind: str | None) -> None:
    """Raises OptionError if an update asks for another split or kind than the index has."""
    for option, wanted, there in (
        ("--split", split, description.get("split")),
        ("--kind", kind, kind_of(description)),
    ):
        if wanted is not None and wanted != there:
            raise OptionError(
                f"{option} {wanted}: the index has {there}, and --update keeps it; leave "
                f"{option} out"
            )


def read_description(path: Path) -> dict[str, Any]:
    """What `index.json` says. Raises RunError if there is no index, or one that is damaged or
    newer."""
    file = path / "index.json"
    if not file.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        hint = "" if path.exists() else nearest(path.name, siblings)
        raise RunError(
            f"{path} is no index{hint} (make one with: apecache index RUN --store STORE --out "
            f"{path})"
        )
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        newer = description["format"] > FORMAT_VERSION
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RunError(f"{file} is damaged; build the index again") from None
    if newer:
        raise RunError(
            f"{file} has format {description['format']}; this apecache reads up to "
            f"{FORMAT_VERSION}: upgrade"
        )
    return description


def kind_of(description: Mapping[str, Any]) -> str:
    return str(description.get("kind", "flat"))


def read_report(description: Mapping[str, Any], part: Part) -> KindReport:
    """How a part was built; of an index that does not say so, as an exact one. Raises RunError if
    it is damaged."""
    exact = {"factory": "Flat", "trained_on": 0, "build_seconds": 0.0}
    try:
        report = KindReport(**description.get("built", {}).get(part, exact))
        if type(report.factory) is not str or type(report.trained_on) is not int:
            raise TypeError
        return report
    except (TypeError, AttributeError):
        raise RunError(
            f"index.json is damaged: it does not say how {part} were built; build the index again"
        ) from None


def read_rows(path: Path, part: Part) -> list[dict[str, str]]:
    """Rows in the order of the vectors. Raises RunError if they cannot be read."""
    try:
        with (path / f"{part}.jsonl").open(encoding="utf-8", newline="\n") as file:
            rows = [json.loads(line) for line in file]
        if not all(isinstance(row["key"], str) and isinstance(row["caption"], str) for row in rows):
            raise ValueError("a row without key and caption")
        return rows
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(
            f"{path / part}.jsonl cannot be read ({error}); build the index again"
        ) from None
