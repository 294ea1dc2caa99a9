"""A searchable index of embeddings (FAISS), with the run that made it, so that it can encode queries by itself.

INDEX/index.json                  what is in it, of which run
INDEX/head.json, head.safetensors (or encoder.…, of a run of fit-encoder)
INDEX/images.faiss, texts.faiss   exact inner product of L2-normalised vectors: cosine
INDEX/images.jsonl, texts.jsonl   keys and captions, in the order of the vectors
"""

import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from apecache.data.images import SUFFIXES, LoadedImage, decode_image
from apecache.data.media import read_file
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, MissingExtraError, OptionError, RowError, RunError, nearest, require_new
from apecache.evaluate.embeddings import Embeddings, OpenImage, embed_store
from apecache.fingerprint import content_hash
from apecache.recipes.runs import Embed, Run, copy_run, image_embedder, load_run, text_embedder
from apecache.store.reader import FeatureStore
from apecache.store.table import PairTable

FORMAT_VERSION = 1
Target = Literal["images", "captions"]


@dataclass(frozen=True)
class Hit:
    """One result. `score` is a cosine. For an image, `caption` is its first caption."""

    rank: int
    key: str
    caption: str
    score: float


@dataclass(frozen=True)
class IndexReport:
    index: Path
    n_images: int
    n_texts: int
    dim: int


def build_index(
    run: Path,
    store: FeatureStore,
    out: Path,
    split: str | None = None,
    overwrite: bool = False,
    open_image: OpenImage | None = None,
) -> IndexReport:
    """Embed a store's images and captions (of one split, or all) and write an index folder, whole or not at all.

    `open_image`: as of `embed_store`.

    Raises:
        RunError: no finished run, or `out` exists. MismatchError: the store is not of the run's encoders.
        MissingExtraError: FAISS is not installed.
    """
    faiss = _faiss()
    if not ((out / "index.json").is_file() and overwrite):
        require_new(out, "index", overwrite)
    loaded = load_run(run)
    embedded = embed_store(loaded, store, split, open_image)
    temporary = out.with_name(f".{out.name}.tmp-{secrets.token_hex(4)}")
    temporary.mkdir(parents=True)
    try:
        copy_run(run, temporary)
        for name, vectors in (("images", embedded.image), ("texts", embedded.text)):
            _write_vectors(faiss, temporary / f"{name}.faiss", vectors)
        _write_rows(temporary, store.pairs, embedded)
        counts = {"n_images": len(embedded.image), "n_texts": len(embedded.text), "dim": embedded.image.shape[1]}
        description = {
            "format": FORMAT_VERSION,
            "head": loaded.digest,
            "split": split,
            "data": store.digest,
            **counts,
        }
        (temporary / "index.json").write_text(json.dumps(description, indent=1), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return IndexReport(out, **counts)


def _write_vectors(faiss: Any, path: Path, vectors: Tensor) -> None:
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors.cpu().numpy()))
    faiss.write_index(index, str(path))


def _write_rows(folder: Path, pairs: PairTable, embedded: Embeddings) -> None:
    first = {
        int(image): row
        for row, image in reversed(list(zip(embedded.text_rows, pairs.image_rows[embedded.text_rows], strict=True)))
    }
    images = ({"key": pairs.keys[i], "caption": pairs.captions[first[int(i)]]} for i in embedded.image_rows)
    texts = ({"key": pairs.keys[pairs.image_rows[t]], "caption": pairs.captions[t]} for t in embedded.text_rows)
    for name, rows in (("images", images), ("texts", texts)):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class SearchIndex:
    """An index that exists. Encoders are loaded at the first query that needs them.

    `image`, `text`: encoders that have moved, in place of those that the index names.
    """

    path: Path
    run: Run
    description: dict[str, Any]
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"

    @staticmethod
    def open(
        path: Path, image: EncoderSpec | None = None, text: EncoderSpec | None = None, device: str = "auto"
    ) -> "SearchIndex":
        """Raises RunError if there is no index, or one that is damaged or of another head than its own."""
        file = path / "index.json"
        if not file.is_file():
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = "" if path.exists() else nearest(path.name, siblings)
            raise RunError(f"{path} is no index{hint} (make one with: apecache index RUN --store STORE --out {path})")
        try:
            description = json.loads(file.read_text(encoding="utf-8"))
            newer = description["format"] > FORMAT_VERSION
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RunError(f"{file} is damaged; build the index again") from None
        if newer:
            raise RunError(
                f"{file} has format {description['format']}; this apecache reads up to {FORMAT_VERSION}: upgrade"
            )
        run = load_run(path, "cpu", image, text)
        if run.digest != description.get("head"):
            raise RunError(f"{path} was built with another head than the one in it; build the index again")
        return SearchIndex(path, run, description, image, text, device)

    def search(self, query: str, k: int = 5, target: Target | None = None) -> list[Hit]:
        """Search by text, or by an image file if `query` is one. By default text finds images and a photo captions.

        Raises:
            OptionError: an empty query or a `k` that makes no sense. DataError: an image that cannot be read.
        """
        path = image_path(query)
        if path is not None:
            return self.search_image(path, k, target or "captions")
        return self.search_text(query, k, target or "images")

    def search_text(self, text: str, k: int = 5, target: Target = "images") -> list[Hit]:
        if not text.strip():
            raise OptionError("the query is empty; give words or an image file")
        return self._nearest(self._embed_texts([text]), k, target)

    def search_image(self, path: Path, k: int = 5, target: Target = "captions") -> list[Hit]:
        try:
            data = read_file(path, str(path))
            loaded = LoadedImage(decode_image(data, str(path)), content_hash(data))
        except RowError as error:
            raise DataError(f"query image cannot be read: {error.detail}") from None
        return self._nearest(self._embed_images([loaded.image]), k, target)

    @cached_property
    def _embed_texts(self) -> Embed:
        return text_embedder(self.run.text, self.device, self.text)

    @cached_property
    def _embed_images(self) -> Embed:
        return image_embedder(self.run.image, self.device, self.image)

    def _nearest(self, query: Tensor, k: int, target: Target) -> list[Hit]:
        """The k nearest of [1, dim], best first; fewer if the index has fewer."""
        if k < 1:
            raise OptionError(f"-k {k}: at least 1 result")
        name = "images" if target == "images" else "texts"
        index = self._vectors(name)
        rows = self._rows(name)
        if (index.ntotal, index.d) != (len(rows), query.shape[1]):
            raise RunError(f"{self.path}: {name}.faiss does not fit {name}.jsonl and the head; build the index again")
        scores, found = index.search(np.ascontiguousarray(query.cpu().numpy()), min(k, index.ntotal))
        return [
            Hit(rank, rows[i][0], rows[i][1], float(score))
            for rank, (i, score) in enumerate(zip(found[0].tolist(), scores[0].tolist(), strict=True), 1)
        ]

    def _vectors(self, name: str) -> Any:
        try:
            return _faiss().read_index(str(self.path / f"{name}.faiss"))
        except RuntimeError as error:
            raise RunError(
                f"{self.path / name}.faiss cannot be read ({str(error).splitlines()[0][:80]}); build it again"
            ) from None

    def _rows(self, name: str) -> Sequence[tuple[str, str]]:
        """(key, caption) in the order of the vectors."""
        try:
            with (self.path / f"{name}.jsonl").open(encoding="utf-8", newline="\n") as file:
                return [(row["key"], row["caption"]) for row in map(json.loads, file)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RunError(f"{self.path / name}.jsonl cannot be read ({error}); build the index again") from None


def image_path(query: str) -> Path | None:
    """The query as an image file: one that exists, or a name that ends like one (then it must exist)."""
    try:
        path = Path(query)
        named = path.suffix.lower() in SUFFIXES and not any(c.isspace() for c in query.strip())
        return path if path.is_file() or named else None
    except (OSError, ValueError):
        return None


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss", "cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss
