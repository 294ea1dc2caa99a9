"""Exact search on the pretended device, without any FAISS for GPUs."""

import numpy as np
from pretended_device.register import DEVICE

from apecache.search.faiss_index import build_vectors


def test_an_exact_index_finds_there_what_it_finds_here() -> None:
    generator = np.random.default_rng(0)
    vectors, queries = (generator.standard_normal((count, 24), np.float32) for count in (40_000, 9))
    here, _ = build_vectors("flat", vectors)
    there = here.to_gpu(DEVICE)
    assert there.on_device is not None
    assert there.on_device.device == DEVICE
    scores, rows = there.search(queries, 10)
    expected_scores, expected_rows = here.search(queries, 10)
    assert np.array_equal(rows, expected_rows)
    assert np.allclose(scores, expected_scores, atol=1e-5)
