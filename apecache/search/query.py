"""Search an index by words, pictures, keys, and sums and differences of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.arguments import AnyPath, as_path, as_texts, require_integer, require_type, wrong_type
from apecache.data.images import PICTURES, SUFFIXES, Picture, open_readable, require_picture
from apecache.device import is_accelerator, resolve_device
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, OptionError, RunError, nearest
from apecache.extraction.encode_texts import caption_error
from apecache.heads.normalization import normalize
from apecache.metrics.csls import CSLS_NEIGHBORS
from apecache.runs.bundle import bundled_encoders
from apecache.runs.load import Embed, Run, image_embedder, load_run, text_embedder
from apecache.search.exact import Floats
from apecache.search.faiss_index import VectorIndex, load_faiss, open_vectors
from apecache.search.index_files import Part, read_description, read_report, read_rows
from apecache.search.where import parse_where, rows_where

Target = Literal["images", "captions"]
CSLS_CANDIDATES = 1000
"""Results by cosine that CSLS ranks again."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """Hold one result."""

    rank: int
    """1 is best."""
    key: str
    """The key of the image."""
    caption: str
    """The words of the caption; of an image, its first caption."""
    score: float
    """A cosine, or with `csls` the CSLS score."""


@dataclass(frozen=True)
class Query:
    """Say what to find.

    Results are near to the sum of `like`, `keys` and `images` less `unlike`. Each term is
    L2-normalized, and so is the sum.
    """

    like: Sequence[str] = ()
    """Words to add."""
    unlike: Sequence[str] = ()
    """Words to subtract."""
    keys: Sequence[str] = ()
    """Keys of images of the index, to add."""
    images: Sequence[Picture] = ()
    """Pictures to add, as `ImageTextModel.encode_image` takes them."""
    files: bool = False
    """Whether a text that names an image file stands for that image. Set it only for texts of the
    user's own, because the file is opened."""

    def require_types(self) -> None:
        """Check the types of all fields, without opening a file.

        Raises:
            OptionError: a field is not a list of texts or of pictures.
        """
        require_type(self.files, bool, "files")
        for name in ("like", "unlike", "keys"):
            as_texts(getattr(self, name), name)
        if not isinstance(self.images, list | tuple):
            raise wrong_type(self.images, f"a list of pictures, each {PICTURES}", "images")
        for number, image in enumerate(self.images):
            require_picture(image, f"images[{number}]")

    @property
    def modality(self) -> Part:
        """Return `images` for pictures alone, and `texts` for words, or words and pictures."""
        # `unlike` counts too: words there need the text encoder.
        terms = (*self.like, *self.unlike)
        return "images" if all(self.path_of(text) for text in terms) else "texts"

    def path_of(self, text: str) -> Path | None:
        """Return the image file that a term names; None for words."""
        return image_path(text) if self.files else None

    @property
    def target(self) -> Target:
        """Return what is found by default: captions by pictures, images by words."""
        return "captions" if self.modality == "images" else "images"


@dataclass(frozen=True, kw_only=True)
class SearchIndex:
    """Search an index folder.

    Encoders and vectors are loaded by the first query that needs them.
    """

    path: Path
    run: Run
    """The run in the index, which encodes queries."""
    description: dict[str, Any]
    """The content of `index.json`."""
    image: EncoderSpec | None = None
    """The image encoder, if it has moved."""
    text: EncoderSpec | None = None
    """The text encoder, if it has moved."""
    device: str = "auto"
    """Where queries are encoded. A named CUDA device also holds the vectors: of an exact index
    without more, of other kinds if FAISS has GPU code."""
    nprobe: int | None = None
    """See `VectorIndex.tune`. None: as the index was built."""
    ef_search: int | None = None
    """See `VectorIndex.tune`. None: as the index was built."""

    @staticmethod
    def open(
        path: AnyPath,
        image: EncoderSpec | None = None,
        text: EncoderSpec | None = None,
        device: str = "auto",
        nprobe: int | None = None,
        ef_search: int | None = None,
    ) -> "SearchIndex":
        """Open an index folder; the fields of this class explain the arguments.

        Raises:
            RunError: no index, or one that is damaged or has another head than its own.
        """
        require_type(image, EncoderSpec, "image", optional=True)
        require_type(text, EncoderSpec, "text", optional=True)
        require_integer(nprobe, "nprobe", optional=True)
        require_integer(ef_search, "ef_search", optional=True)
        folder = as_path(path, "path")
        description = read_description(folder)
        bundled_image, bundled_text = bundled_encoders(folder)
        # An encoder that the user names goes before the one in the bundle.
        image = image or bundled_image
        text = text or bundled_text
        run = load_run(folder, device="cpu", image=image, text=text)
        # Vectors of other heads would give wrong results without any error.
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
        """Find by words: images, unless `target` says captions.

        It raises the errors of `find`. To search by a picture, see `Query.images`.

        Args:
            query: the words.
            k: number of results.
            target: what to find.
            csls: rank by CSLS, see `find`.
            files: a `query` that names an image file stands for that image, which finds captions.
                Without it no file is opened, whatever the text.
        """
        require_type(query, str, "query")
        return self.find(Query((query,), files=files), k, target, csls)

    def find(
        self,
        query: Query,
        k: int = 5,
        target: Target | None = None,
        csls: bool = False,
        where: str | None = None,
        min_score: float | None = None,
    ) -> list[Hit]:
        """Find the k nearest, best first.

        There are fewer results if the index holds fewer, or if an approximate index finds fewer.

        Args:
            query: what to find.
            k: number of results.
            target: images or captions. None: captions by pictures alone; images by words, and
                where the index has no captions.
            csls: rank the 1,000 nearest by 2 cos(x, y) - r(x) - r(y). r(x) is the mean cosine of
                the query to its ten nearest. r(y) is that of a result to its ten nearest of the
                query's modality in the index. Hubs, which are near to all vectors, then rank lower
                (Conneau et al. 2018, Word translation without parallel data, section 2.3).
            where: only rows that meet these conditions, as `apecache.search.where` parses them.
                They are searched exactly, whatever the kind of the index.
            min_score: only results that score as high. See `nothing_found`.

        Raises:
            OptionError: an empty query, terms that cancel out, a `k` below 1, a wrong type, or
                captions of an index that has none.
            DataError: an image that cannot be read, or a key that the index does not have.
        """
        require_type(query, Query, "query")
        require_integer(k, "k")
        if k < 1:
            raise OptionError(f"-k {k}: at least 1 result")
        modality = self._part(target or self.target_of(query))
        if csls:
            self._require_neighbors(query)
        if csls and where is not None:
            raise OptionError("--where and --csls exclude each other: leave one out")
        vector = self.embed(query).cpu().numpy()
        vectors, rows = self._opened(modality)
        # CSLS ranks again: a good result may stand lower by its cosine alone.
        n_candidates = max(k, CSLS_CANDIDATES) if csls else k
        if where is None:
            all_scores, all_rows = vectors.search(vector, n_candidates)
        else:
            conditions = parse_where(where, self.description.get("columns", ()))
            matching = rows_where(conditions, rows)
            all_scores, all_rows = vectors.search_among(matching, vector, n_candidates)
        # One query, so one row of results. An approximate index fills it up with -1.
        is_found = all_rows[0] >= 0
        scores = all_scores[0][is_found]
        found_rows = all_rows[0][is_found]
        if csls:
            scores, found_rows = self._csls(
                vectors,
                neighbor_index=self._opened(query.modality)[0],
                cosines=scores,
                rows=found_rows,
            )
        hits = []
        results = zip(found_rows[:k].tolist(), scores[:k].tolist(), strict=True)
        for rank, (row_number, score) in enumerate(results, 1):
            # The scores fall, so no later result is high enough.
            if min_score is not None and score < min_score:
                break
            row = rows[row_number]
            hits.append(Hit(rank=rank, key=row["key"], caption=row["caption"], score=score))
        return hits

    def target_of(self, query: Query) -> Target:
        """Return what the query finds by default.

        In an index without captions a picture finds images too.
        """
        require_type(query, Query, "query")
        query.require_types()
        return query.target if self.has_captions else "images"

    @property
    def has_captions(self) -> bool:
        """Return whether the index holds captions."""
        return self.description.get("n_texts") != 0

    def nothing_found(self, target: Target) -> float | None:
        """Return the cosine that the best result stays below if the index has no answer.

        95 % of the index's own captions (or images) have no wrong image (or caption) that scores
        as high. The index measures this when it is built.

        Args:
            target: what is searched.

        Returns:
            The cosine; None for an index that was built without it, or with too few rows.
        """
        target_part = self._part(target)
        value = (self.description.get("nothing_found") or {}).get(target_part)
        return None if value is None else float(value)

    def _part(self, target: Target) -> Part:
        """Return the modality of the target, as the files of the index name it."""
        if target not in ("images", "captions"):
            raise OptionError(f"--target {target}: expected images or captions")
        if target == "captions" and not self.has_captions:
            raise OptionError(f"{self.path} holds no captions; find images: --target images")
        return "images" if target == "images" else "texts"

    def _require_neighbors(self, query: Query) -> None:
        """Require vectors of the query's modality, which CSLS compares results with."""
        query.require_types()
        if query.modality == "texts" and not self.has_captions:
            raise OptionError(
                f"{self.path} holds no captions, which --csls compares with; leave --csls out"
            )

    def embed(self, query: Query) -> Tensor:
        """Embed a query -> float32 [1, dim], L2-normalized, on the CPU.

        It raises the errors of `find`.
        """
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
        # What is unlike these has a negative cosine with them.
        terms += [-self._embed(text, query.path_of(text)) for text in query.unlike]
        total = torch.cat(terms).sum(0, keepdim=True)
        # Rounding errors have a direction too, so a sum near zero is not normalized.
        if float(total.norm()) < 1e-4:
            raise OptionError("the terms of the query cancel out: `like` and `unlike` are the same")
        return normalize(total, dim=1)

    def _embed(self, text: str, path: Path | None) -> Tensor:
        """Embed words or an image file, [1, dim], L2-normalized."""
        if path is not None:
            return self._embed_picture(path, str(path))
        if not text.strip():
            raise OptionError("the query is empty; give words or an image file")
        error = caption_error(text)
        if error is not None:
            raise OptionError(f"the query cannot be encoded: {error.detail}")
        return self._shortened(self._embed_texts([text]).cpu())

    def _shortened(self, embedded: Tensor) -> Tensor:
        """Return the values that the index keeps of an embedding, L2-normalized again."""
        dim = int(self.description.get("dim", embedded.shape[1]))
        # A shorter vector is not of length 1 any more.
        return embedded if dim == embedded.shape[1] else normalize(embedded[:, :dim], dim=1)

    def _embed_picture(self, picture: Picture, name: str) -> Tensor:
        opened = open_readable(picture, name, "query image")
        return self._shortened(self._embed_images([opened]).cpu())

    def _embed_key(self, key: str) -> Tensor:
        row = self.row_of_key.get(key)
        if row is None:
            raise DataError(f"{self.path} has no image {key!r}{nearest(key, self.row_of_key)}")
        vectors, _ = self._opened("images")
        return torch.from_numpy(vectors.vectors(np.array([row])))

    def _csls(
        self,
        vectors: VectorIndex,
        neighbor_index: VectorIndex,
        cosines: Floats,
        rows: NDArray[np.int64],
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Rank results of one query again.

        Args:
            vectors: the index that was searched.
            neighbor_index: the index of the query's modality.
            cosines: [n], of the results with the query, best first.
            rows: [n], of the results.

        Returns:
            CSLS scores and rows, [n] each, best first.
        """
        result_vectors = vectors.vectors(rows)
        neighbor_cosines, neighbor_rows = neighbor_index.search(result_vectors, CSLS_NEIGHBORS)
        # An approximate index may find fewer than asked for: -1 marks what is missing.
        near_rows = np.where(neighbor_rows >= 0, neighbor_cosines, 0).sum(1) / np.maximum(
            (neighbor_rows >= 0).sum(1),
            1,
        )
        scores = 2 * cosines - cosines[:CSLS_NEIGHBORS].mean() - near_rows
        # Stable, so that equal scores keep the order of their cosines.
        order = np.argsort(-scores, kind="stable")
        return scores[order], rows[order]

    def _opened(self, modality: Part) -> tuple[VectorIndex, list[dict[str, str]]]:
        """Return the vectors and rows of a modality, loaded once."""
        # Even when they are loaded: it sets FAISS's threads to Torch's.
        load_faiss()
        return self._images if modality == "images" else self._texts

    @cached_property
    def _images(self) -> tuple[VectorIndex, list[dict[str, str]]]:
        return self._open("images")

    @cached_property
    def _texts(self) -> tuple[VectorIndex, list[dict[str, str]]]:
        return self._open("texts")

    def _open(self, modality: Part) -> tuple[VectorIndex, list[dict[str, str]]]:
        report = read_report(self.description, modality)
        vectors = open_vectors(self.path / f"{modality}.faiss", report.factory)
        rows = read_rows(self.path, modality)
        if vectors.shape != (len(rows), self.description.get("dim")):
            raise RunError(
                f"{self.path}: {modality}.faiss does not fit {modality}.jsonl and the head; build "
                "the index again"
            )
        vectors.tune(self.nprobe, self.ef_search)
        # Only on request: not every FAISS has GPU code, and not every kind can be moved.
        if self.device != "auto" and is_accelerator(resolve_device(self.device)):
            vectors = vectors.to_gpu(resolve_device(self.device))
        return vectors, rows

    @property
    def image_rows(self) -> Sequence[Mapping[str, str]]:
        """Return key and first caption of every image, in the order of the vectors."""
        _, rows = self._opened("images")
        return rows

    @cached_property
    def row_of_key(self) -> dict[str, int]:
        """Map the key of each image to its row."""
        _, rows = self._images
        return {row["key"]: row_number for row_number, row in enumerate(rows)}

    @cached_property
    def _embed_texts(self) -> Embed:
        return text_embedder(self.run.text, self.device, self.text)

    @cached_property
    def _embed_images(self) -> Embed:
        return image_embedder(self.run.image, self.device, self.image)


def image_path(query: str) -> Path | None:
    """Return the path if the query names an image file; None for words.

    A file that exists counts, and a name that ends like one, even if it does not exist.
    """
    # Words can be too long for a path, or hold a null character: then the system refuses them.
    try:
        path = Path(query)
        # A sentence that ends in `.jpg` is still a sentence.
        has_space = any(character.isspace() for character in query.strip())
        is_named = path.suffix.lower() in SUFFIXES and not has_space
        return path if path.is_file() or is_named else None
    except (OSError, ValueError):
        return None
