"""Searching an index by words, pictures, keys, and sums and differences of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.arguments import AnyPath, as_path, as_texts, require_type, wrong_type
from apecache.data.images import PICTURES, SUFFIXES, Picture, open_readable, require_picture
from apecache.encoders.encoder import parse_device
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, RunError, nearest
from apecache.heads.normalization import normalize
from apecache.runs.load import Embed, Run, image_embedder, load_run, text_embedder
from apecache.search.faiss_index import Floats, VectorIndex, load_faiss, open_vectors
from apecache.search.index import Part, read_description, read_report, read_rows

Target = Literal["images", "captions"]
CSLS_NEIGHBOURS = 10
CSLS_CANDIDATES = 1000


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One result. `score` is a cosine, or the CSLS score where that was asked for. For an image,
    `caption` is its first caption."""

    rank: int
    key: str
    caption: str
    score: float


@dataclass(frozen=True)
class Query:
    """What to find. Results are near to the sum of `like`, `keys` and `images` less `unlike`, each
    L2-normalised before and the sum again.

    `like`, `unlike`: words. `keys`: images of the index. `images`: pictures, as
    `ImageTextModel.encode_image` takes them. `files`: a text of `like` or `unlike` that names an
    image file stands for that image. Set it only where the texts are the user's own: the file is
    opened.
    """

    like: Sequence[str] = ()
    unlike: Sequence[str] = ()
    keys: Sequence[str] = ()
    images: Sequence[Picture] = ()
    files: bool = False

    def require_types(self) -> None:
        """Raises OptionError for what is no list of texts or of pictures. Nothing is opened."""
        for name in ("like", "unlike", "keys"):
            as_texts(getattr(self, name), name)
        if not isinstance(self.images, list | tuple):
            raise wrong_type(self.images, f"a list of pictures, each {PICTURES}", "images")
        for number, image in enumerate(self.images):
            require_picture(image, f"images[{number}]")

    @property
    def modality(self) -> Part:
        """Of pictures alone images; of words, or both, texts."""
        return (
            "images" if all(self.path_of(text) for text in (*self.like, *self.unlike)) else "texts"
        )

    def path_of(self, text: str) -> Path | None:
        """The image file that a term names; None for words."""
        return image_path(text) if self.files else None

    @property
    def target(self) -> Target:
        """What is found unless it is said: by pictures captions, by words images."""
        return "captions" if self.modality == "images" else "images"


@dataclass(frozen=True, kw_only=True)
class SearchIndex:
    """An index that exists. Encoders and vectors are loaded at the first query that needs them.

    `image`, `text`: encoders that have moved, in place of those that the index names. `device`: a
    CUDA device that is named (not `auto`) also holds the vectors, if FAISS can. `nprobe`,
    `ef_search`: see `apecache.search.faiss_index`; None: as the index was built.
    """

    path: Path
    run: Run
    description: dict[str, Any]
    image: EncoderSpec | None = None
    text: EncoderSpec | None = None
    device: str = "auto"
    nprobe: int | None = None
    ef_search: int | None = None

    @staticmethod
    def open(
        path: AnyPath,
        image: EncoderSpec | None = None,
        text: EncoderSpec | None = None,
        device: str = "auto",
        nprobe: int | None = None,
        ef_search: int | None = None,
    ) -> "SearchIndex":
        """Raises RunError if there is no index, or one that is damaged or of another head than its
        own."""
        require_type(image, EncoderSpec, "image", optional=True)
        require_type(text, EncoderSpec, "text", optional=True)
        folder = as_path(path, "path")
        description = read_description(folder)
        run = load_run(folder, device="cpu", image=image, text=text)
        if run.digest != description.get("head"):
            raise RunError(
                f"{folder} was built with another head than the one in it; build the index again"
            )
        return SearchIndex(
            path=folder,
            run=run,
            description=description,
            image=image,
            text=text,
            device=device,
            nprobe=nprobe,
            ef_search=ef_search,
        )

    def search(
        self,
        query: str,
        k: int = 5,
        target: Target | None = None,
        csls: bool = False,
        files: bool = False,
    ) -> list[Hit]:
        """Find by words: images, unless `target` says captions. Raises as `find` does.

        `files`: a `query` that names an image file stands for that image, which finds captions.
        Without it no file is opened, whatever the text. For a picture in the first place see
        `Query.images`.
        """
        require_type(query, str, "query")
        return self.find(Query((query,), files=files), k, target, csls)

    def find(
        self,
        query: Query,
        k: int = 5,
        target: Target | None = None,
        csls: bool = False,
    ) -> list[Hit]:
        """The k nearest, best first; fewer if there are fewer, or if an approximate index finds
        fewer.

        `csls`: ranked by 2 cos(x, y) - r(x) - r(y), r(x) the mean cosine of the query to its ten
        nearest, r(y) that of a result to its ten nearest of the query's modality in the index:
        hubs, which are near to everything, come later (Conneau et al. 2018, Word translation
        without parallel data, section 2.3). Among the 1,000 nearest by cosine.

        Args:
            target: None for captions by pictures alone, and for images by words or where the index
                has no captions.

        Raises:
            OptionError: an empty query, terms that cancel out, a `k` that makes no sense, a wrong
                type, or captions of
            an index that has none. DataError: an image that cannot be read, or a key that the index
                does not have.
        """
        require_type(query, Query, "query")
        require_type(k, (int, np.integer), "k")
        if k < 1:
            raise OptionError(f"-k {k}: at least 1 result")
        part = self._part(target or self.target_of(query))
        if csls:
            self._require_neighbours(query)
        vector = self.embed(query).cpu().numpy()
        vectors, rows = self._opened(part)
        scores, found = (
            side[0] for side in vectors.search(vector, max(k, CSLS_CANDIDATES) if csls else k)
        )
        scores = scores[found >= 0]
        found = found[found >= 0]
        if csls:
            scores, found = self._csls(
                vectors,
                others=self._opened(query.modality)[0],
                cosines=scores,
                rows=found,
            )
        ranked = enumerate(zip(found[:k].tolist(), scores[:k].tolist(), strict=True), 1)
        return [
            Hit(rank=rank, key=rows[i]["key"], caption=rows[i]["caption"], score=score)
            for rank, (i, score) in ranked
        ]

    def target_of(self, query: Query) -> Target:
        """What the query finds by default. An index without captions gives images for a picture
        too."""
        require_type(query, Query, "query")
        query.require_types()
        return query.target if self.has_captions else "images"

    @property
    def has_captions(self) -> bool:
        return self.description.get("n_texts") != 0

    def _part(self, target: Target) -> Part:
        if target not in ("images", "captions"):
            raise OptionError(f"--target {target}: expected images or captions")
        if target == "captions" and not self.has_captions:
            raise OptionError(f"{self.path} holds no captions; find images: --target images")
        return "images" if target == "images" else "texts"

    def _require_neighbours(self, query: Query) -> None:
        """CSLS compares results with what the index holds of the query's modality."""
        query.require_types()
        if query.modality == "texts" and not self.has_captions:
            raise OptionError(
                f"{self.path} holds no captions, which --csls compares with; leave --csls out"
            )

    def embed(self, query: Query) -> Tensor:
        """float32 [1, dim], L2-normalised, on the CPU. Raises as `find` does."""
        require_type(query, Query, "query")
        query.require_types()
        if not (query.like or query.keys or query.images):
            raise OptionError("the query is empty; give words, an image file or --key")
        terms = [self._embed(text, query.path_of(text)) for text in query.like]
        terms += [self._embed_key(key) for key in query.keys]
        terms += [
            self._embed_picture(image, f"images[{number}]")
            for number, image in enumerate(query.images)
        ]
        terms += [-self._embed(text, query.path_of(text)) for text in query.unlike]
        total = torch.cat(terms).sum(0, keepdim=True)
        if float(total.norm()) < 1e-4:
            raise OptionError(
                "the terms of the query cancel out: what is like and what is unlike are the same"
            )
        return normalize(total, dim=1)

    def _embed(self, text: str, path: Path | None) -> Tensor:
        """Words, or an image file. As they come from the head: normalised."""
        if path is not None:
            return self._embed_picture(path, str(path))
        if not text.strip():
            raise OptionError("the query is empty; give words or an image file")
        return self._embed_texts([text]).cpu()

    def _embed_picture(self, picture: Picture, name: str) -> Tensor:
        return self._embed_images([open_readable(picture, name, "query image")]).cpu()

    def _embed_key(self, key: str) -> Tensor:
        row = self.row_of_key.get(key)
        if row is None:
            raise DataError(f"{self.path} has no image {key!r}{nearest(key, self.row_of_key)}")
        return torch.from_numpy(self._opened("images")[0].vectors(np.array([row])))

    def _csls(
        self,
        vectors: VectorIndex,
        others: VectorIndex,
        cosines: Floats,
        rows: NDArray[np.int64],
    ) -> tuple[Floats, NDArray[np.int64]]:
        near, found = others.search(vectors.vectors(rows), CSLS_NEIGHBOURS)
        near_rows = np.where(found >= 0, near, 0).sum(1) / np.maximum((found >= 0).sum(1), 1)
        scores = 2 * cosines - cosines[:CSLS_NEIGHBOURS].mean() - near_rows
        order = np.argsort(-scores, kind="stable")
        return scores[order], rows[order]

    def _opened(self, part: Part) -> tuple[VectorIndex, list[dict[str, str]]]:
        load_faiss()
        return self._images if part == "images" else self._texts

    @cached_property
    def _images(self) -> tuple[VectorIndex, list[dict[str, str]]]:
        return self._open("images")

    @cached_property
    def _texts(self) -> tuple[VectorIndex, list[dict[str, str]]]:
        return self._open("texts")

    def _open(self, part: Part) -> tuple[VectorIndex, list[dict[str, str]]]:
        vectors = open_vectors(
            self.path / f"{part}.faiss",
            read_report(self.description, part).factory,
        )
        rows = read_rows(self.path, part)
        if vectors.shape != (len(rows), self.description.get("dim")):
            raise RunError(
                f"{self.path}: {part}.faiss does not fit {part}.jsonl and the head; build the "
                "index again"
            )
        vectors.tune(self.nprobe, self.ef_search)
        return (
            vectors.to_gpu(parse_device(self.device)) if self.device.startswith("cuda") else vectors
        ), rows

    @property
    def image_rows(self) -> Sequence[Mapping[str, str]]:
        """Key and first caption of every image, in the order of the vectors."""
        return self._opened("images")[1]

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        return {row["key"]: i for i, row in enumerate(self._images[1])}

    @cached_property
    def _embed_texts(self) -> Embed:
        return text_embedder(self.run.text, self.device, self.text)

    @cached_property
    def _embed_images(self) -> Embed:
        return image_embedder(self.run.image, self.device, self.image)


def image_path(query: str) -> Path | None:
    """The query as an image file: one that exists, or a name that ends like one (then it must
    exist)."""
    try:
        path = Path(query)
        named = path.suffix.lower() in SUFFIXES and not any(c.isspace() for c in query.strip())
        return path if path.is_file() or named else None
    except (OSError, ValueError):
        return None
