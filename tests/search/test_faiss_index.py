"""Kinds of FAISS indexes: what they find, how that is measured, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import torch

import apecache.search.exact
import apecache.search.faiss_index
from apecache.errors import DataError, OptionError, RunError
from apecache.search.exact import Floats, exact_search, recall
from apecache.search.faiss_index import build_vectors, factory_of, measured, open_vectors


def clustered(n: int, seed: int = 0, dim: int = 16) -> Floats:
    """Normalized vectors around 20 centers."""
    centers = np.random.default_rng(7).standard_normal((20, dim))
    chance = np.random.default_rng(seed)
    vectors = centers[chance.integers(20, size=n)] + 0.4 * chance.standard_normal((n, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


VECTORS = clustered(1500)
QUERIES = clustered(1200, 1)
KINDS = (
    "flat",
    "ivf",
    "hnsw",
    "SQ8",
    "IVF16,SQ8",
    "PQ8x4",
    "PCA14,IVF16,Flat",
    "IVF16_HNSW32,Flat",
    "SQ4,RFlat",
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_saved_mapped_and_measured(
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built, report = build_vectors(kind, VECTORS)
    report = measured(report, built=built, vectors=VECTORS, queries=QUERIES)
    built.save(tmp_path / "x.faiss")
    scores, rows = built.search(QUERIES[:20], 10)
    for smallest in (1 << 28, 0):
        monkeypatch.setattr(apecache.search.faiss_index, "MMAP_BYTES", smallest)
        opened = open_vectors(tmp_path / "x.faiss", report.factory)
        again = opened.search(QUERIES[:20], 10)
        assert np.array_equal(again[1], rows)
        assert np.array_equal(again[0], scores)
        assert np.einsum("nd,nd->n", opened.vectors(np.arange(9)), VECTORS[:9]).min() > 0.7
    if kind == "flat":
        assert (report.recall_at_10, report.trained_on) == (None, 0)
    else:
        exact = np.argsort(-QUERIES @ VECTORS.T, kind="stable")[:, :10]
        chosen = np.sort(np.random.default_rng(0).permutation(1200)[:1000])
        found = built.search(QUERIES[chosen], 10)[1]
        share = np.mean([len({*a} & {*b}) / 10 for a, b in zip(found, exact[chosen], strict=True)])
        assert report.recall_at_10 == pytest.approx(share, abs=2e-3)
        assert report.n_queries == 1000
        assert report.ms_per_query
        assert report.exact_ms_per_query


@pytest.mark.parametrize("kind", ["ivf", "IVF16,SQ8"])
def test_training_twice_gives_the_same(kind: str) -> None:
    (first, _), (second, _) = (build_vectors(kind, VECTORS) for _ in range(2))
    for a, b in zip(first.search(QUERIES, 10), second.search(QUERIES, 10), strict=True):
        assert np.array_equal(a, b)


def test_an_exact_index_is_a_matrix_product() -> None:
    scores, rows = build_vectors("flat", VECTORS)[0].search(QUERIES, 5)
    product = QUERIES @ VECTORS.T
    np.testing.assert_allclose(scores, -np.sort(-product)[:, :5], atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(product, rows, 1), scores, atol=1e-6)


@pytest.mark.parametrize("tile", [1, 64, 1499, 1500, 9999])
def test_tiles_change_nothing(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    product = QUERIES[:50] @ VECTORS.T
    monkeypatch.setattr(apecache.search.exact, "TILE", tile)
    for k in (1, 100, 1500):
        scores, rows = exact_search(VECTORS, QUERIES[:50], k)
        np.testing.assert_allclose(scores, -np.sort(-product)[:, :k], atol=1e-6)
        np.testing.assert_allclose(np.take_along_axis(product, rows, 1), scores, atol=1e-6)


def test_equal_vectors_count_as_found_and_missing_ones_do_not() -> None:
    vectors = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    best = np.ones((1, 2), np.float32)
    for found, share in (([[1, 2]], 1.0), ([[0, 5]], 0.5), ([[0, -1]], 0.5), ([[-1, -1]], 0.0)):
        assert (
            recall(
                vectors[:1],
                vectors=vectors,
                found=np.array(found),
                best=best,
            )
            == share
        )


@pytest.mark.parametrize(
    ("n", "factory"),
    [(700, "IVF16,Flat"), (3000, "IVF64,Flat"), (100_000, "IVF512,Flat"), (10**6, "IVF1024,Flat")],
)
def test_lists_grow_with_the_root_and_stay_filled(n: int, factory: str) -> None:
    assert factory_of("ivf", n) == factory


def test_more_lists_and_candidates_find_more() -> None:
    for kind, option in (("IVF32,Flat", "nprobe"), ("HNSW4", "ef_search")):
        built, report = build_vectors(kind, VECTORS)
        shares = []
        for value in (1, 32, 400):
            built.tune(*((value, None) if option == "nprobe" else (None, value)))
            shares.append(
                measured(report, built=built, vectors=VECTORS, queries=QUERIES).recall_at_10 or 0.0
            )
        assert shares[0] < shares[-1] > 0.98


def test_a_number_for_another_kind_is_refused() -> None:
    flat = build_vectors("flat", VECTORS)[0]
    graph = build_vectors("hnsw", VECTORS[:50])[0]
    with pytest.raises(OptionError, match="--nprobe 4: an index of kind Flat has no use for it"):
        flat.tune(4, None)
    with pytest.raises(OptionError, match="--ef-search 0: at least 1"):
        graph.tune(None, 0)


@pytest.mark.parametrize("kind", ["ivf", "IVF16,Flat", "PQ8x4", "IVF4,PQ8x4"])
def test_too_few_vectors_name_the_exact_kind(kind: str) -> None:
    with pytest.raises(DataError, match=r"100 vectors are too few to train .* use --kind flat"):
        build_vectors(kind, VECTORS[:100])


@pytest.mark.parametrize("kind", ["bogus", "", "LSH", "IVF16,PQ7", "IDMap,Flat"])
def test_a_kind_that_faiss_refuses_is_one_line(kind: str) -> None:
    with pytest.raises(
        OptionError,
        match=r"FAISS refuses .*expected flat, ivf, hnsw, int8, binary or a FAISS factory",
    ) as caught:
        build_vectors(kind, VECTORS)
    assert len(str(caught.value).splitlines()) == 1
    assert "/" not in str(caught.value)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_added_and_refilled_vectors_are_found(kind: str) -> None:
    built, _ = build_vectors(kind, VECTORS[:1400])
    built.add(VECTORS[1400:])
    assert built.shape == (1500, 16)
    assert (built.search(VECTORS[1400:], 1)[1][:, 0] == np.arange(1400, 1500)).mean() > 0.95
    built.refill(VECTORS[1000:])
    assert built.shape == (500, 16)
    assert (built.search(VECTORS[1000:], 1)[1][:, 0] == np.arange(500)).mean() > 0.95


def test_a_faiss_without_gpu_says_what_to_install() -> None:
    import faiss

    if hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus():
        pytest.skip("this FAISS has a GPU")
    with pytest.raises(DataError, match=r"apecache\[gpu\]"):
        build_vectors("ivf", VECTORS)[0].to_gpu(torch.device("cuda", 0))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"x\.faiss cannot be read"):
        open_vectors(tmp_path / "x.faiss", "Flat")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_small_index_on_a_full_disk_is_an_error() -> None:
    """FAISS's own writer only prints that closing the file failed, and the file is cut short."""
    built, _ = build_vectors("flat", np.eye(8, dtype=np.float32))
    with pytest.raises(OSError, match="No space left"):
        built.save(Path("/dev/full"))
