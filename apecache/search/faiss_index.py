"""Build, measure, search and store FAISS indexes of L2-normalized vectors by inner product.

A kind is `flat` (exact), `ivf` (inverted lists), `hnsw` (a graph), `int8` or `binary` (codes), or a
FAISS factory string: `IVF256,PQ32`, …. Sizes depend on the number of vectors n:
- `ivf`: the largest power of two up to 2 sqrt(n) lists, with at least 39 vectors each, as FAISS
  requires. At 100,000 vectors that is 512 lists. A search reads 1 list in 16, but at least 8.
- `int8`: one byte for each value. `binary`: one bit for each value; the 10 k best are ranked
  again by int8 values.
- `hnsw`: 32 links, and 64 candidates in a search, or 128 from a million vectors on.
FAISS samples the vectors for training, with a fixed seed.
"""

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apecache.errors import DataError, MissingExtraError, OptionError, RunError, raise_if_refused
from apecache.search.exact import TILE, Floats, exact_search, recall, shortened

PER_CENTROID = 39
"""Vectors per centroid that FAISS requires for training."""
SEED = 0
QUERIES = 1000
"""Queries of a measurement, at most."""
TOP = 10
"""Neighbors of a measurement."""
REFINED = 10
"""Candidates per result that a kind with `Refine` ranks again."""
MMAP_BYTES = 1 << 28
"""Files of this size or larger are mapped into memory instead of being read."""


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """Say how an index was built, and for approximate kinds how well it finds."""

    factory: str
    """FAISS's factory string."""
    trained_on: int
    """Vectors that it was trained on; 0 if the kind needs no training."""
    build_seconds: float
    n_queries: int = 0
    """Queries of the measurement, of the other modality."""
    recall_at_10: float | None = None
    """Share of the ten nearest vectors that are found, 0 to 1."""
    ms_per_query: float | None = None
    """Milliseconds for each query of one batch."""
    exact_ms_per_query: float | None = None
    """The same of an exact search."""


@dataclass(frozen=True, kw_only=True)
class VectorIndex:
    """Search, extend and store one FAISS index."""

    factory: str
    """FAISS's factory string."""
    index: Any
    """The FAISS index."""
    on_gpu: Any = None
    """The same index on a GPU, for searches only."""
    on_device: Tensor | None = None
    """The vectors of an exact index on an accelerator, for searches only."""

    @property
    def shape(self) -> tuple[int, int]:
        """Return the number of vectors and their width."""
        return self.index.ntotal, self.index.d

    def search(self, queries: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
        """Find the k nearest vectors of each query.

        Args:
            queries: [n, dim], L2-normalized.
            k: results of each query; at most the number of vectors.

        Returns:
            Inner products and rows, [n, k] each, best first. The row is -1 where an approximate
            index found fewer.
        """
        k = min(k, self.index.ntotal)
        if k == 0:
            no_scores = np.empty((len(queries), 0), np.float32)
            no_rows = np.empty((len(queries), 0), np.int64)
            return no_scores, no_rows
        # Torch's product is faster than FAISS's exact search on some processors.
        if self.factory == "Flat":
            vectors = self.flat_vectors if self.on_device is None else self.on_device
            return exact_search(vectors, queries, k)
        searched = self.index if self.on_gpu is None else self.on_gpu
        scores, rows = searched.search(np.ascontiguousarray(queries), k)
        return scores, rows

    def search_among(
        self,
        rows: NDArray[np.int64],
        queries: Floats,
        k: int,
    ) -> tuple[Floats, NDArray[np.int64]]:
        """Find the k nearest vectors of each query among some rows, exactly.

        Args:
            rows: rows of the index, rising.
            queries: [n, dim], L2-normalized.
            k: results of each query.

        Returns:
            As `search` returns; fewer than k columns where there are fewer rows.

        Raises:
            OptionError: a kind that cannot give its vectors back.
        """
        best = np.empty((len(queries), 0), np.float32)
        best_rows = np.empty((len(queries), 0), np.int64)
        # Tile by tile: all vectors of a large index would not fit in memory a second time.
        for begin in range(0, len(rows), TILE):
            tile_rows = rows[begin : begin + TILE]
            stored = self.vectors(tile_rows)
            scores, tile_positions = exact_search(stored, queries, min(k, len(tile_rows)))
            best = np.concatenate((best, scores), axis=1)
            best_rows = np.concatenate((best_rows, tile_rows[tile_positions]), axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(best, order, 1), np.take_along_axis(best_rows, order, 1)

    @property
    def flat_vectors(self) -> Floats:
        """Return the vectors of an exact index without a copy, from memory or the mapped file."""
        stored: Floats = load_faiss().rev_swig_ptr(
            self.index.get_xb(),
            self.index.ntotal * self.index.d,
        )
        return stored.reshape(self.index.ntotal, self.index.d)

    def vectors(self, rows: NDArray[np.int64]) -> Floats:
        """Return the stored vectors of some rows, [n, dim].

        Quantized kinds return what their codes stand for, L2-normalized again.

        Raises:
            OptionError: a kind that cannot give its vectors back.
        """
        if self.factory == "Flat":
            return self.flat_vectors[rows]
        lists = _lists(self.index)
        try:
            if lists is not None:
                # Inverted lists find a vector by its row only with this map.
                lists.make_direct_map()
            stored: Floats = self.index.reconstruct_batch(np.ascontiguousarray(rows))
        except RuntimeError as error:
            raise OptionError(
                f"an index of kind {self.factory} keeps no vectors ({_why(error)})"
            ) from None
        norms = np.linalg.norm(stored, axis=1, keepdims=True)
        normalized: Floats = stored / np.maximum(norms, 1e-12)
        return normalized

    def add(self, vectors: Floats) -> None:
        """Append vectors [n, dim]."""
        self.index.add(np.ascontiguousarray(vectors))

    def refill(self, vectors: Floats) -> None:
        """Replace all vectors; the trained state stays."""
        self.index.reset()
        self.add(vectors)

    def tune(self, nprobe: int | None, ef_search: int | None) -> None:
        """Set how much of the index a search reads.

        Args:
            nprobe: inverted lists that are read. None: unchanged.
            ef_search: candidates in the search of a graph. None: unchanged.

        Raises:
            OptionError: the kind has no lists, or no graph, or the number is below 1.
        """
        lists = _lists(self.index)
        graph = _graph(self.index)
        for option, value, structure in (
            ("--nprobe", nprobe, lists),
            ("--ef-search", ef_search, graph),
        ):
            if value is not None and (structure is None or value < 1):
                if structure is None:
                    why = f"an index of kind {self.factory} has no use for it"
                else:
                    why = "at least 1"
                raise OptionError(f"{option} {value}: {why}")
        if nprobe is not None:
            lists.nprobe = nprobe
            coarse = _graph(lists.quantizer)
            # Where the lists are found by a graph, it must offer more candidates than lists read.
            if coarse is not None:
                coarse.efSearch = max(coarse.efSearch, 2 * nprobe)
        if ef_search is not None:
            graph.efSearch = ef_search

    def to_gpu(self, device: torch.device) -> "VectorIndex":
        """Return this index with searches on a GPU.

        An exact index is searched by torch. Inverted lists need a FAISS with GPU code, which was
        not tried.

        Raises:
            DataError: this FAISS has no GPU code, or sees no GPU.
            OptionError: a kind that FAISS does not support on a GPU.
        """
        if self.factory == "Flat":
            return replace(self, on_device=torch.from_numpy(self.flat_vectors).to(device))
        faiss = load_faiss()
        if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
            raise DataError(
                "this FAISS has no GPU; install 'apecache[gpu]' in place of [cpu], or leave "
                "--device auto"
            )
        try:
            moved = faiss.index_cpu_to_gpu(
                faiss.StandardGpuResources(),
                device.index or 0,
                self.index,
            )
        except RuntimeError as error:
            raise OptionError(
                f"an index of kind {self.factory} cannot be on a GPU ({_why(error)})"
            ) from None
        return replace(self, on_gpu=moved)

    def save(self, path: Path) -> None:
        """Write the index to a file."""
        faiss = load_faiss()
        # Through Python's file: FAISS's own writer drops the error when the last block finds the
        # disk full.
        with path.open("wb") as file:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))


def allocate_flat(n: int, dim: int) -> VectorIndex:
    """Return an exact index of n vectors whose `flat_vectors` are still to be written.

    Vectors that are computed straight into it are in memory once; `build_vectors` copies them.
    """
    faiss = load_faiss()
    index = faiss.index_factory(dim, "Flat", faiss.METRIC_INNER_PRODUCT)
    index.codes.resize(n * index.code_size)
    index.ntotal = n
    return VectorIndex(factory="Flat", index=index)


def build_vectors(kind: str, vectors: Floats) -> tuple[VectorIndex, KindReport]:
    """Build an index: train it on vectors [n, dim], L2-normalized, and fill it with them.

    An index without vectors is exact, whatever its kind.

    Raises:
        DataError: too few vectors to train the kind.
        OptionError: no such kind.
        MissingExtraError: FAISS is not installed.
    """
    faiss = load_faiss()
    factory = factory_of(kind, len(vectors)) if len(vectors) else "Flat"
    begin = time.perf_counter()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        to_train = not index.is_trained
        _require_enough(index, factory, len(vectors))
        lists = _lists(index)
        # With a fixed seed the same vectors make the same index.
        if lists is not None:
            lists.cp.seed = SEED
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        expected = "flat, ivf, hnsw, int8, binary or a FAISS factory string like IVF256,PQ32"
        raise OptionError(
            f"--kind {kind}: FAISS refuses {factory} ({_why(error)}); expected {expected}"
        ) from None
    built = VectorIndex(factory=factory, index=index)
    # Codes of one bit are coarse: more candidates are ranked again than are asked for.
    if hasattr(index, "k_factor"):
        index.k_factor = REFINED
    nprobe, ef_search = _defaults(index, len(vectors))
    built.tune(nprobe, ef_search)
    return built, KindReport(
        factory=factory,
        trained_on=len(vectors) if to_train else 0,
        build_seconds=time.perf_counter() - begin,
    )


def measured(
    report: KindReport,
    built: VectorIndex,
    vectors: Floats,
    queries: Floats,
    dim: int | None = None,
) -> KindReport:
    """Measure recall and times of an index, and add them to its report.

    The report stays unchanged for an exact index of whole vectors, and without queries. A vector
    that scores as high as the tenth nearest counts as found, because equal captions score alike.

    Args:
        report: how the index was built.
        built: the index.
        vectors: [n, full_dim], the whole vectors.
        queries: [m, full_dim]; up to 1,000 of them are drawn, with a fixed seed.
        dim: values of a vector in the index; None: all.
    """
    is_whole = dim is None or dim == vectors.shape[1]
    if (built.factory == "Flat" and is_whole) or not len(queries):
        return report
    sample = np.sort(np.random.default_rng(SEED).permutation(len(queries))[:QUERIES])
    queries = np.ascontiguousarray(queries[sample])
    k = min(TOP, len(vectors))
    short_queries = queries if dim is None else shortened(queries, dim)
    # The first search pays for start-up, so it is not timed.
    built.search(short_queries[:1], k)
    begin = time.perf_counter()
    _, found_rows = built.search(short_queries, k)
    middle = time.perf_counter()
    best, _ = exact_search(vectors, queries, k)
    end = time.perf_counter()
    return replace(
        report,
        n_queries=len(queries),
        recall_at_10=recall(queries, vectors=vectors, found=found_rows, best=best),
        ms_per_query=1000 * (middle - begin) / len(queries),
        exact_ms_per_query=1000 * (end - middle) / len(queries),
    )


def open_vectors(path: Path, factory: str, mmap: bool = True) -> VectorIndex:
    """Open the file of an index.

    Large files are mapped if `mmap` is set: vectors are then read when they are compared.

    Raises:
        RunError: a file that is missing or damaged.
    """
    faiss = load_faiss()
    large = mmap and path.is_file() and path.stat().st_size >= MMAP_BYTES
    mapped = faiss.IO_FLAG_MMAP if "IVF" in factory else faiss.IO_FLAG_MMAP_IFC
    try:
        return VectorIndex(
            factory=factory,
            index=faiss.read_index(str(path), mapped if large else 0),
        )
    except RuntimeError as error:
        raise_if_refused(path)
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0][:80]}); build it again"
        ) from None


def factory_of(kind: str, n: int) -> str:
    """Return FAISS's factory string of a kind for n vectors."""
    match kind:
        case "flat":
            return "Flat"
        case "hnsw":
            return "HNSW32"
        case "int8":
            return "SQ8"
        case "binary":
            return "RaBitQ,Refine(SQ8)"
        case "ivf":
            max_lists = min(2 * math.sqrt(n), n / PER_CENTROID)
            return f"IVF{2 ** int(math.log2(max(max_lists, 16)))},Flat"
        case _:
            return kind


def load_faiss() -> ModuleType:
    """Import FAISS.

    Raises:
        MissingExtraError: FAISS is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss", "cpu") from None
    # FAISS counts cores by itself; the user sets threads for Torch.
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _defaults(index: Any, n: int) -> tuple[int | None, int | None]:
    """Return nprobe and ef_search for n vectors; None where the index has no such setting."""
    lists = _lists(index)
    nprobe = None if lists is None else max(8, lists.nlist // 16)
    if _graph(index) is None:
        return nprobe, None
    ef_search = 64 if n < 1_000_000 else 128
    return nprobe, ef_search


def _require_enough(index: Any, factory: str, n: int) -> None:
    """Refuse to train on too few vectors, which FAISS would only warn of."""
    core = _core(index)
    n_lists = getattr(core, "nlist", 0)
    quantizer = getattr(core, "pq", None)
    n_codes = 0 if quantizer is None else quantizer.ksub
    needed = PER_CENTROID * max(n_lists, n_codes)
    if n < needed:
        raise DataError(
            f"{n:,} vectors are too few to train {factory}, which needs {needed:,}; use --kind flat"
        )


def _core(index: Any) -> Any:
    """Return the index that holds the vectors, inside transformations and refinements."""
    faiss = load_faiss()
    core = faiss.downcast_index(index)
    for inner in ("index", "base_index"):
        if isinstance(core, faiss.IndexPreTransform | faiss.IndexRefine) and hasattr(core, inner):
            return _core(getattr(core, inner))
    return core


def _lists(index: Any) -> Any:
    """Return the inverted lists of an index, or None."""
    core = _core(index)
    return core if hasattr(core, "nprobe") else None


def _graph(index: Any) -> Any:
    """Return the graph of an index, or None."""
    return getattr(_core(index), "hnsw", None)


def _why(error: RuntimeError) -> str:
    """Return FAISS's message without its source file and line."""
    first_line = str(error).splitlines()[0]
    message = re.split(r"\.(?:cpp|h):\d+: ", first_line)[-1]
    return message.strip()[:100]
