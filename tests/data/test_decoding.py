"""Decoding ahead of the model, in processes and in threads: the same rows in the same order,
whatever happens."""

import os
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from apecache.data.decoding import PrefetchSpec, Preprocessed, in_threads, preprocess_ahead
from apecache.data.images import LoadedImage, load_image
from apecache.data.media import FolderMedia
from apecache.errors import RowError
from apecache.fingerprint import content_hash

SHAPE = (1, 3, 8, 8)


def noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


@pytest.fixture
def folder(tmp_path: Path) -> tuple[Path, list[str]]:
    """48 images, 1 to 48 pixels wide; every fifth is bad in one way or another."""
    for width in range(1, 49):
        noise(width, 3, width).save(tmp_path / f"{width}.png")
    for width in range(5, 49, 5):
        path = tmp_path / f"{width}.png"
        path.write_bytes(path.read_bytes()[: 60 if width % 2 else 0])
    (tmp_path / "10.png").unlink()
    return tmp_path, [f"{width}.png" for width in range(1, 49)]


def loader(root: Path) -> Any:
    return lambda key: load_image(key, FolderMedia(root=root))


def small(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
    pixels = np.asarray(loaded.image.resize((8, 8)), np.float32)
    return [
        torch.from_numpy(pixels).permute(2, 0, 1)[None],
        torch.tensor([float(loaded.image.width)]),
    ]


def rows_of(
    folder: tuple[Path, list[str]],
    ahead: PrefetchSpec,
    preprocess: Any = small,
) -> list[tuple[Any, ...]]:
    """Everything that came, copied while it was valid."""
    root, keys = folder
    with preprocess_ahead(
        keys,
        load=loader(root),
        preprocess=preprocess,
        shapes=[SHAPE, (1,)],
        ahead=ahead,
    ) as decoded:
        return [plain(row) for row in decoded]


def plain(row: Preprocessed[list[Tensor]]) -> tuple[Any, ...]:
    values = None if row.value is None else tuple(value.numpy().tobytes() for value in row.value)
    return values, row.digest, row.error and (row.error.reason, row.error.detail)


@pytest.mark.parametrize("workers", [0, 1, 2, 8])
@pytest.mark.parametrize("images", [1, 5, 100])
def test_images_come_in_the_order_of_their_keys_with_bad_ones_between(
    folder: tuple[Path, list[str]],
    workers: int,
    images: int,
) -> None:
    root, keys = folder
    rows = rows_of(folder, PrefetchSpec(workers=workers, images=images))
    reasons = {i + 1: row[2][0] for i, row in enumerate(rows) if row[2]}
    expected = {width: "truncated" if width % 2 else "empty" for width in range(5, 49, 5)} | {
        10: "missing"
    }
    assert reasons == expected
    for key, row in zip(keys, rows, strict=True):
        assert row[1] == ("" if row[2] else content_hash((root / key).read_bytes()))
        if not row[2]:
            assert row[0] == tuple(value.numpy().tobytes() for value in small(loader(root)(key)))


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, list[str]]:
    for width in range(1, 31):
        noise(width, 3, width).save(tmp_path / f"{width}.png")
    return tmp_path, [f"{width}.png" for width in range(1, 31)]


def children() -> set[int]:
    found = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/children").read_text()
    return {int(pid) for pid in found.split()}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No child, zombie or not, no thread and no open file is left."""
    before = children(), threading.active_count(), len(os.listdir("/proc/self/fd"))
    yield
    assert (children(), threading.active_count(), len(os.listdir("/proc/self/fd"))) == before


DEATHS = {
    3: lambda: os._exit(7),
    4: lambda: os.kill(os.getpid(), 9),
    11: lambda: os.kill(os.getpid(), 11),
    12: lambda: time.sleep(60),
    30: lambda: os._exit(0),
}


def deadly(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
    DEATHS.get(loaded.image.width, lambda: None)()
    return small(loaded)


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_what_brings_a_worker_down_costs_its_own_row_and_no_other(
    good: tuple[Path, list[str]],
    workers: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    whole = rows_of(good, PrefetchSpec(workers=0, images=7))
    rows = rows_of(good, PrefetchSpec(workers=workers, images=7, hang_seconds=1.0), deadly)
    lost = {i + 1: row[2] for i, row in enumerate(rows) if row[2]}
    assert lost == {
        3: ("decoder-crash", "3.png: the decoder ended with exit status 7"),
        4: ("decoder-crash", "4.png: the decoder was ended by SIGKILL"),
        11: ("decoder-crash", "11.png: the decoder was ended by SIGSEGV"),
        12: ("decoder-hang", "12.png: no end after 1 s"),
        30: ("decoder-crash", "30.png: the decoder ended with exit status 0"),
    }
    assert [row for i, row in enumerate(rows, 1) if i not in lost] == [
        row for i, row in enumerate(whole, 1) if i not in lost
    ]
    assert capfd.readouterr() == ("", "")


def test_slow_is_not_hung_while_images_keep_coming(good: tuple[Path, list[str]]) -> None:
    def slow(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        time.sleep(0.15)
        return small(loaded)

    assert not [
        row
        for row in rows_of(
            (good[0], good[1][:10]),
            PrefetchSpec(workers=2, images=4, hang_seconds=0.5),
            slow,
        )
        if row[2]
    ]


def test_a_consumer_that_takes_its_time_makes_nobody_hang(good: tuple[Path, list[str]]) -> None:
    with preprocess_ahead(
        good[1][:6],
        load=loader(good[0]),
        preprocess=small,
        shapes=[SHAPE, (1,)],
        ahead=PrefetchSpec(workers=2, images=3, hang_seconds=0.1),
    ) as decoded:
        for row in decoded:
            time.sleep(0.15)
            assert row.error is None


@pytest.mark.parametrize("workers", [0, 2])
def test_leaving_early_stops_the_work(
    good: tuple[Path, list[str]],
    workers: int,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"

    def logged(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        with log.open("a") as file:
            file.write("x")
        time.sleep(0.01)
        return small(loaded)

    keys = good[1] * 10
    with preprocess_ahead(
        keys,
        load=loader(good[0]),
        preprocess=logged,
        shapes=[SHAPE, (1,)],
        ahead=PrefetchSpec(workers=workers, images=len(keys)),
    ) as decoded:
        next(decoded)
    at_exit = log.stat().st_size
    assert at_exit < len(keys) / 2
    time.sleep(0.05)
    assert log.stat().st_size == at_exit


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_leaving_by_an_error_stops_the_work_too(
    good: tuple[Path, list[str]],
    workers: int,
    error: type[BaseException],
) -> None:
    with (  # noqa: PT012
        pytest.raises(error),
        preprocess_ahead(
            good[1],
            load=loader(good[0]),
            preprocess=small,
            shapes=[SHAPE, (1,)],
            ahead=PrefetchSpec(workers=workers, images=4),
        ) as decoded,
    ):
        next(decoded)
        raise error


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_the_encoder_cannot_take_is_a_bad_row(
    good: tuple[Path, list[str]],
    workers: int,
) -> None:
    def refuse(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        raise ValueError("too narrow")

    (row,) = rows_of((good[0], good[1][:1]), PrefetchSpec(workers=workers, images=1), refuse)
    assert row[1:] == ("", ("unusable", "1.png: too narrow"))


@pytest.mark.parametrize(("workers", "kind"), [(0, TypeError), (2, RuntimeError)])
def test_a_defect_is_not_a_bad_row(
    good: tuple[Path, list[str]],
    workers: int,
    kind: type[Exception],
) -> None:
    def defect(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        raise TypeError("a defect" + "x" * 10_000)

    with pytest.raises(kind, match=r"x{100}"):
        rows_of(good, PrefetchSpec(workers=workers, images=4), defect)


def test_pixels_of_another_shape_than_announced_are_a_defect(good: tuple[Path, list[str]]) -> None:
    with pytest.raises(RuntimeError, match=r"torch.float32 \(3, 8, 8\) in place of \(1, 3, 8, 8\)"):
        rows_of(
            good,
            PrefetchSpec(workers=2, images=4),
            lambda loaded: [small(loaded)[0][0], small(loaded)[1]],
        )


@pytest.mark.parametrize("detail", ["x" * 10_000, "\ud800 漢字" * 3000, '"\\\n' * 5000])
def test_reasons_of_any_length_and_kind_arrive_cut_to_fit(
    good: tuple[Path, list[str]],
    detail: str,
) -> None:
    def refuse(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        raise RowError("unusable", detail)

    (row,) = rows_of((good[0], good[1][:1]), PrefetchSpec(workers=1, images=1), refuse)
    assert row[2][0] == "unusable"
    assert len(row[2][1]) > 300
    assert detail.startswith(row[2][1])


@pytest.mark.parametrize("workers", [0, 3])
def test_decoding_is_never_further_ahead_than_allowed(
    good: tuple[Path, list[str]],
    workers: int,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    log.touch()

    def logged(loaded: LoadedImage[Image.Image]) -> list[Tensor]:
        with log.open("a") as file:
            file.write("x")
        return small(loaded)

    with preprocess_ahead(
        good[1],
        load=loader(good[0]),
        preprocess=logged,
        shapes=[SHAPE, (1,)],
        ahead=PrefetchSpec(workers=workers, images=6),
    ) as decoded:
        for consumed, _ in enumerate(decoded, 1):
            time.sleep(0.005)
            assert log.stat().st_size <= consumed + 6
    assert log.stat().st_size == len(good[1])


def test_no_keys_are_no_rows(good: tuple[Path, list[str]]) -> None:
    assert (
        rows_of((good[0], []), PrefetchSpec(workers=2, images=4))
        == rows_of((good[0], []), PrefetchSpec(workers=0, images=4))
        == []
    )


def test_decoding_in_threads_leaves_the_warning_filters_of_the_process_alone(
    good: tuple[Path, list[str]],
) -> None:
    before = list(warnings.filters)
    for _ in range(3):
        with in_threads(
            good[1] * 5,
            load=loader(good[0]),
            preprocess=lambda loaded: loaded.image.size,
            threads=8,
            ahead=32,
        ) as decoded:
            assert sum(1 for _ in decoded) == 150
        assert list(warnings.filters) == before
