"""Commits in a thread beside the encoding: in order, none lost, and errors as without a thread."""

import threading

import numpy as np
import pytest
import torch

from apecache.extraction.background import BackgroundCommits
from apecache.extraction.encode import ShardRows
from apecache.store.layout import ArrayLayout


def nothing() -> None:
    pass


def test_a_commit_runs_beside_the_caller_and_the_next_one_waits_for_it() -> None:
    may_end = threading.Event()
    order: list[str] = []

    def first() -> None:
        # Only the caller, which encodes the next shard meanwhile, lets the commit end.
        assert may_end.wait(60)
        order.append("first committed")

    with BackgroundCommits() as commits:
        commits.put(first, lambda: order.append("first counted"))
        order.append("encoded")
        may_end.set()
        commits.put(
            lambda: order.append("second committed"),
            lambda: order.append("second counted"),
        )
    assert order == [
        "encoded",
        "first committed",
        "first counted",
        "second committed",
        "second counted",
    ]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_the_error_of_a_commit_is_raised_and_it_is_not_counted(error: BaseException) -> None:
    counted: list[int] = []
    begun: list[int] = []

    def fail() -> None:
        raise error

    def run() -> None:
        with BackgroundCommits() as commits:
            commits.put(fail, lambda: counted.append(1))
            commits.put(lambda: begun.append(2), lambda: counted.append(2))

    with pytest.raises(type(error)):
        run()
    assert (begun, counted) == ([], [])


def test_the_error_of_the_last_commit_is_raised_at_the_end() -> None:
    def fail() -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), BackgroundCommits() as commits:
        commits.put(fail, nothing)


def test_an_interrupted_encoding_lets_the_commit_end_that_has_begun() -> None:
    committed: list[int] = []
    may_end = threading.Event()

    def commit() -> None:
        assert may_end.wait(60)
        committed.append(1)

    def run() -> None:
        with BackgroundCommits() as commits:
            commits.put(commit, nothing)
            may_end.set()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run()
    assert committed == [1]


def test_of_two_errors_that_of_the_earlier_rows_is_raised() -> None:
    def fail() -> None:
        raise OSError("disk full")

    def run() -> None:
        with BackgroundCommits() as commits:
            commits.put(fail, nothing)
            raise ValueError("the next shard cannot be encoded")

    with pytest.raises(OSError, match="disk full"):
        run()


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_are_rounded_as_numpy_rounds_them_and_overflows_are_told_apart(dtype: str) -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 15, (64, 32), generator=generator)
    encoded = torch.randn(64, 32, generator=generator) * 2.0**exponents
    encoded[3, 5] = 1e6
    encoded[7, 1] = torch.inf
    encoded[9, 0] = torch.nan
    layout = ArrayLayout(rows=64, dim=32, dtype=dtype, shard_rows=64, batch_size=64, threads=1)
    shard_rows = ShardRows(64, layout)
    copy = shard_rows.copy_of(encoded)
    with np.errstate(over="ignore"):
        expected = encoded.numpy().astype(shard_rows.features.dtype)
    assert copy.rows().dtype == shard_rows.features.dtype
    np.testing.assert_array_equal(copy.rows(), expected)
    assert np.flatnonzero(~copy.finite()).tolist() == [7, 9]
