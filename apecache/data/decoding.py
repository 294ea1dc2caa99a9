"""Read, decode and preprocess images ahead of the model, in processes or in threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import cpu_count
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from apecache.data.images import LoadedImage
from apecache.data.media import Media, ObjectMedia, base_media
from apecache.data.processes import CRASH, HANG, can_fork, open_processes
from apecache.errors import ApecacheError, RowError

T = TypeVar("T")

MAX_THREADS = 16
LOST = (CRASH, HANG)


@dataclass(frozen=True, kw_only=True)
class Preprocessed(Generic[T]):
    """Hold what `preprocess` made of one image, or the reason why there is nothing."""

    value: T | None
    digest: str
    """Content hash of the file; empty if it was not read."""
    error: RowError | None


@dataclass(frozen=True, kw_only=True)
class PrefetchSpec:
    """Configure how decoding runs ahead of the model.

    A file that crashes its decoder costs one row in a process, and the whole run in a thread.
    """

    workers: int
    """Number of processes. 0 uses threads of this process, as does a system without fork."""
    images: int
    """Largest number of images in front of the consumer."""
    hang_seconds: float = 30.0
    """How long a process may take for one image."""
    threads: int | None = None
    """Number of threads; None for one per core."""


def reading_ahead(
    media: Media,
    workers: int,
    images: int,
    hang_seconds: float = 30.0,
) -> PrefetchSpec:
    """Return how to decode the images of a medium ahead."""
    # Many requests in flight hide the latency of object storage, and forked processes cannot share
    # its client: hence threads.
    if isinstance(base_media(media), ObjectMedia):
        return PrefetchSpec(workers=0, images=images + MAX_THREADS, threads=MAX_THREADS)
    return PrefetchSpec(workers=workers, images=images, hang_seconds=hang_seconds)


Decode = Callable[[Sequence[int]], Iterator[Preprocessed[list[Tensor]]]]
"""Preprocess the images of these rows in a list of keys, in this order. Each result is valid
until the next one is asked for; all are taken before the next call."""


@contextmanager
def preprocess_ahead(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    ahead: PrefetchSpec,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Iterator[Preprocessed[list[Tensor]]]]:
    """Preprocess images in the order of `keys`; the arguments are those of `open_decoders`."""
    with open_decoders(
        keys,
        load=load,
        preprocess=preprocess,
        shapes=shapes,
        ahead=ahead,
        dtype=dtype,
    ) as decode:
        yield decode(range(len(keys)))


def open_decoders(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    ahead: PrefetchSpec,
    dtype: torch.dtype = torch.float32,
) -> AbstractContextManager[Decode]:
    """Start decoders of images, which stay from one call to the next.

    A row whose image `load` or `preprocess` refuses carries the reason. The reasons
    `decoder-crash` and `decoder-hang` mean that a process died or was killed.

    Args:
        keys: The images, which a call names by their row in this list.
        load: Reads and decodes one image.
        preprocess: Turns a decoded image into tensors.
        shapes: Shapes of the tensors that `preprocess` returns.
        ahead: How far and with what to run ahead.
        dtype: Of these tensors.
    """
    if ahead.workers and can_fork():
        return _in_processes(
            keys,
            load=load,
            preprocess=preprocess,
            shapes=shapes,
            ahead=ahead,
            dtype=dtype,
        )
    threads = ahead.threads or ahead.workers or min(MAX_THREADS, cpu_count() or 1)
    return open_threads(keys, load=load, preprocess=preprocess, threads=threads, ahead=ahead.images)


@contextmanager
def _in_processes(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    ahead: PrefetchSpec,
    dtype: torch.dtype,
) -> Iterator[Decode]:
    def work(position: int) -> tuple[list[Tensor] | None, str, RowError | None]:
        attempt = _attempt(keys[position], load, preprocess)
        return attempt.value, attempt.digest, attempt.error

    with open_processes(
        work,
        shapes=shapes,
        workers=min(ahead.workers, len(keys)),
        ahead=ahead.images,
        hang_seconds=ahead.hang_seconds,
        dtype=dtype,
    ) as results_of:

        def decode(rows: Sequence[int]) -> Iterator[Preprocessed[list[Tensor]]]:
            for row, result in zip(rows, results_of(rows), strict=True):
                value, digest, error = result
                named = Preprocessed(value=value, digest=digest, error=error)
                yield _named(keys[row], named)

        yield decode


def _named(key: str, result: Preprocessed[T]) -> Preprocessed[T]:
    """Name the image in the error of a decoder that died, which could not do so itself."""
    if result.error is None or result.error.reason not in LOST:
        return result
    return Preprocessed(
        value=None,
        digest="",
        error=RowError(result.error.reason, f"{key}: {result.error.detail}"),
    )


@contextmanager
def in_threads(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], T],
    threads: int,
    ahead: int,
) -> Iterator[Iterator[Preprocessed[T]]]:
    """Preprocess images in threads, in the order of `keys`."""
    with open_threads(
        keys, load=load, preprocess=preprocess, threads=threads, ahead=ahead
    ) as decode:
        yield decode(range(len(keys)))


@contextmanager
def open_threads(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], T],
    threads: int,
    ahead: int,
) -> Iterator[Callable[[Sequence[int]], Iterator[Preprocessed[T]]]]:
    """Start threads for `Decode`; Pillow decodes and resizes without the interpreter's lock."""
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:

        def decode(rows: Sequence[int]) -> Iterator[Preprocessed[T]]:
            return _in_order(
                [keys[row] for row in rows],
                work=lambda key: _attempt(key, load, preprocess),
                pool=pool,
                ahead=ahead,
            )

        try:
            yield decode
        finally:
            # Images that nobody waits for any more are not decoded.
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    keys: Sequence[str],
    work: Callable[[str], Preprocessed[T]],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[Preprocessed[T]]:
    """Yield the results in the order of `keys`, with at most `ahead` of them in work."""
    waiting: deque[Future[Preprocessed[T]]] = deque(pool.submit(work, key) for key in keys[:ahead])
    for position in range(len(keys)):
        result = waiting.popleft().result()
        if position + ahead < len(keys):
            waiting.append(pool.submit(work, keys[position + ahead]))
        yield result


def _attempt(
    key: str,
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], T],
) -> Preprocessed[T]:
    try:
        loaded = load(key)
        return Preprocessed(value=preprocess(loaded), digest=loaded.digest, error=None)
    except RowError as error:
        return Preprocessed(value=None, digest="", error=error)
    except ApecacheError:
        # Not the fault of one row: the storage does not answer.
        raise
    except MemoryError:
        # Of one image: the next ones may be smaller.
        detail = f"{key} needs more memory than there is; use fewer --workers"
        return Preprocessed(value=None, digest="", error=RowError("out-of-memory", detail))
    except (ValueError, OSError, RuntimeError) as error:
        return Preprocessed(value=None, digest="", error=RowError("unusable", f"{key}: {error}"))
