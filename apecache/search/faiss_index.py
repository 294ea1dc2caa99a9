"""FAISS indexes of one set of L2-normalised vectors by inner product: their kinds, how well they
find, their files.

A kind is `flat` (exact), `ivf` (inverted lists), `hnsw` (a graph), or a FAISS factory string:
`IVF256,PQ32`, `SQ8`, …. Sizes by the number of vectors n:
- `ivf`: the largest power of two up to 2 sqrt(n) lists, each of 39 vectors at least (what FAISS
  asks for), so 512 lists at 100,000; 1 list in 16 is looked through, but never fewer than 8;
- `hnsw`: 32 links, 64 candidates in the search, 128 from a million vectors on.
Training takes FAISS's own samples of the vectors with a fixed seed.
"""

import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from apecache.errors import DataError, MissingExtraError, OptionError, RunError

PER_CENTROID = 39
SEED = 0
QUERIES = 1000
TOP = 10
TILE = 16384
MMAP_BYTES = 1 << 28
"""Files from this size on are mapped into memory in place of read."""
Floats = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class KindReport:
    """How an index was built, and how well it finds. `trained_on`: so many vectors (0: nothing to
    train).

    Of approximate kinds, over `n_queries` of the other modality: share of the ten nearest that are
    found, and milliseconds for each query in one batch, here and by comparing with everything.
    """

    factory: str
    trained_on: int
    build_seconds: float
    n_queries: int = 0
    recall_at_10: float | None = None
    ms_per_query: float | None = None
    exact_ms_per_query: float | None = None


@dataclass(frozen=True, kw_only=True)
class VectorIndex:
    """`index` is FAISS's; `on_gpu` the same on a GPU, for searching."""

    factory: str
    index: Any
    on_gpu: Any = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.index.ntotal, self.index.d

    def search(self, queries: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
        """[n, k] inner products and rows, best first; row -1 where an approximate index found
        fewer."""
        k = min(k, self.index.ntotal)
        if k == 0:
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if self.factory == "Flat" and self.on_gpu is None:
            return exact_search(self._flat, queries, k)
        searched = self.index if self.on_gpu is None else self.on_gpu
        scores, rows = searched.search(np.ascontiguousarray(queries), k)
        return scores, rows

    @property
    def _flat(self) -> Floats:
        """The vectors of an exact index where they lie: in memory, or in the mapped file."""
        found: Floats = load_faiss().rev_swig_ptr(
            self.index.get_xb(),
            self.index.ntotal * self.index.d,
        )
        return found.reshape(self.index.ntotal, self.index.d)

    def vectors(self, rows: NDArray[np.int64]) -> Floats:
        """[n, dim] as they are kept: quantised kinds give what their codes stand for, normalised
        again.

        Raises:
            OptionError: a kind that cannot give its vectors back.
        """
        lists = _lists(self.index)
        try:
            if lists is not None:
                lists.make_direct_map()
            found: Floats = self.index.reconstruct_batch(np.ascontiguousarray(rows))
        except RuntimeError as error:
            raise OptionError(
                f"an index of kind {self.factory} keeps no vectors ({_why(error)})"
            ) from None
        normalised: Floats = found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return normalised

    def add(self, vectors: Floats) -> None:
        self.index.add(np.ascontiguousarray(vectors))

    def refill(self, vectors: Floats) -> None:
        """Other vectors in place of these; what was trained stays."""
        self.index.reset()
        self.add(vectors)

    def tune(self, nprobe: int | None, ef_search: int | None) -> None:
        """Look through so many lists; keep so many candidates on the way through a graph.

        Raises:
            OptionError: the kind has no lists, or no graph, or the number is below 1.
        """
        lists = _lists(self.index)
        graph = _graph(self.index)
        for option, value, part in (("--nprobe", nprobe, lists), ("--ef-search", ef_search, graph)):
            if value is not None and (part is None or value < 1):
                why = (
                    f"an index of kind {self.factory} has no use for it"
                    if part is None
                    else "at least 1"
                )
                raise OptionError(f"{option} {value}: {why}")
        if nprobe is not None:
            lists.nprobe = nprobe
            coarse = _graph(lists.quantizer)
            if coarse is not None:
                coarse.efSearch = max(coarse.efSearch, 2 * nprobe)
        if ef_search is not None:
            graph.efSearch = ef_search

    def to_gpu(self, device: torch.device) -> "VectorIndex":
        """Search on a GPU; for exact indexes and inverted lists. Written by FAISS's documentation;
        not measured.

        Raises:
            DataError: this FAISS has no GPU code, or sees no GPU. OptionError: a kind that FAISS
                has on no GPU.
        """
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
        """Write through Python's file: FAISS's own writer drops the error when a full disk refuses
        the last block."""
        faiss = load_faiss()
        with path.open("wb") as file:
            faiss.write_index(self.index, faiss.PyCallbackIOWriter(file.write))


def build_vectors(kind: str, vectors: Floats) -> tuple[VectorIndex, KindReport]:
    """Train on and fill with [n, dim]. An index of no vectors is exact, whatever its kind.

    Raises:
        DataError: too few vectors to train the kind. OptionError: no such kind. MissingExtraError:
            no FAISS.
    """
    faiss = load_faiss()
    factory = factory_of(kind, len(vectors)) if len(vectors) else "Flat"
    begin = time.perf_counter()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        to_train = not index.is_trained
        _require_enough(index, factory, len(vectors))
        lists = _lists(index)
        if lists is not None:
            lists.cp.seed = SEED
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        known = "flat, ivf, hnsw or a FAISS factory string like IVF256,PQ32"
        raise OptionError(
            f"--kind {kind}: FAISS refuses {factory} ({_why(error)}); expected {known}"
        ) from None
    built = VectorIndex(factory=factory, index=index)
    built.tune(*_defaults(index, len(vectors)))
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
) -> KindReport:
    """The report with recall and times on up to 1,000 of the queries, drawn with a fixed seed;
    unchanged for an exact index, and where there are no queries.

    A vector that scores as high as the tenth counts as found: equal captions do.
    """
    if built.factory == "Flat" or not len(queries):
        return report
    chosen = np.sort(np.random.default_rng(SEED).permutation(len(queries))[:QUERIES])
    queries = np.ascontiguousarray(queries[chosen])
    k = min(TOP, len(vectors))
    built.search(queries[:1], k)
    begin = time.perf_counter()
    _, found = built.search(queries, k)
    middle = time.perf_counter()
    best, _ = exact_search(vectors, queries, k)
    end = time.perf_counter()
    return replace(
        report,
        n_queries=len(queries),
        recall_at_10=recall(queries, vectors=vectors, found=found, best=best),
        ms_per_query=1000 * (middle - begin) / len(queries),
        exact_ms_per_query=1000 * (end - middle) / len(queries),
    )


def exact_search(vectors: Floats, queries: Floats, k: int) -> tuple[Floats, NDArray[np.int64]]:
    """The k best of [n, dim] for each query: scores and rows [n_queries, k], best first.

    Torch's matrix product by tiles of vectors, faster than FAISS's own on some processors; memory
    is that of a tile.
    """
    asked = torch.from_numpy(np.ascontiguousarray(queries))
    best = torch.empty(len(asked), 0)
    rows = torch.empty(len(asked), 0, dtype=torch.long)
    buffer = torch.empty(len(asked) * min(TILE, len(vectors)))
    for begin in range(0, len(vectors), TILE):
        tile = torch.from_numpy(vectors[begin : begin + TILE])
        scores = buffer[: len(asked) * len(tile)].view(len(asked), len(tile))
        torch.mm(asked, tile.T, out=scores)
        found = scores.topk(min(k, scores.shape[1]), dim=1)
        candidates = torch.cat((best, found.values), 1)
        places = torch.cat((rows, found.indices + begin), 1)
        best, order = candidates.topk(min(k, candidates.shape[1]), dim=1)
        rows = places.gather(1, order)
    return best.numpy(), rows.numpy()


def recall(queries: Floats, vectors: Floats, found: NDArray[np.int64], best: Floats) -> float:
    """Share of `found` rows [n, k] that score as high as the k-th of the `best` scores [n, k]."""
    scores = np.einsum("qd,qkd->qk", queries, vectors[found])
    return float(((found >= 0) & (scores >= best[:, -1:] - 1e-6)).mean())


def open_vectors(path: Path, factory: str, mmap: bool = True) -> VectorIndex:
    """Large files are mapped: their vectors (inverted lists, with those) are read when they are
    compared.

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
        raise RunError(
            f"{path} cannot be read ({str(error).splitlines()[0][:80]}); build it again"
        ) from None


def factory_of(kind: str, n: int) -> str:
    """FAISS's name of a kind for n vectors. Raises DataError if they are too few for `ivf`."""
    match kind:
        case "flat":
            return "Flat"
        case "hnsw":
            return "HNSW32"
        case "ivf":
            most = min(2 * math.sqrt(n), n / PER_CENTROID)
            return f"IVF{2 ** int(math.log2(max(most, 16)))},Flat"
        case _:
            return kind


def load_faiss() -> Any:
    """Raises MissingExtraError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise MissingExtraError("faiss", "cpu") from None
    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def _defaults(index: Any, n: int) -> tuple[int | None, int | None]:
    lists = _lists(index)
    nprobe = None if lists is None else max(8, lists.nlist // 16)
    return nprobe, None if _graph(index) is None else 64 if n < 1_000_000 else 128


def _require_enough(index: Any, factory: str, n: int) -> None:
    core = _core(index)
    coded = getattr(core, "pq", None)
    centroids = max(getattr(core, "nlist", 0), 0 if coded is None else coded.ksub)
    if n < PER_CENTROID * centroids:
        needed = PER_CENTROID * centroids
        raise DataError(
            f"{n:,} vectors are too few to train {factory}, which needs {needed:,}; use --kind flat"
        )


def _core(index: Any) -> Any:
    """Inside transformations and refinements, what holds the vectors."""
    faiss = load_faiss()
    core = faiss.downcast_index(index)
    for inner in ("index", "base_index"):
        if isinstance(core, faiss.IndexPreTransform | faiss.IndexRefine) and hasattr(core, inner):
            return _core(getattr(core, inner))
    return core


def _lists(index: Any) -> Any:
    core = _core(index)
    return core if hasattr(core, "nprobe") else None


def _graph(index: Any) -> Any:
    return getattr(_core(index), "hnsw", None)


def _why(error: RuntimeError) -> str:
    """FAISS's message without its place in FAISS."""
    return re.split(r"\.(?:cpp|h):\d+: ", str(error).splitlines()[0])[-1].strip()[:100]
