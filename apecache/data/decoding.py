"""Images read, decoded and preprocessed ahead of the model that takes them: in processes, or in
threads."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from os import cpu_count
from typing import Any, Generic, TypeVar

from torch import Tensor

from apecache.data.images import LoadedImage
from apecache.data.media import Media, ObjectMedia
from apecache.data.processes import CRASH, HANG, can_fork, open_processes
from apecache.errors import ApecacheError, RowError

T = TypeVar("T")

MAX_THREADS = 16
LOST = (CRASH, HANG)


@dataclass(frozen=True, kw_only=True)
class Preprocessed(Generic[T]):
    """What `preprocess` made of one image, or why there is none. `digest` is that of the file,
    empty if unread."""

    value: T | None
    digest: str
    error: RowError | None


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """How decoding runs ahead of the model.

    `workers`: processes; 0 is threads of this process, one for each core, as wherever there is no
    fork. A file that brings down its decoder costs a process nothing but its one row, a thread the
    whole run. `images`: how many at most are in front of the consumer. `hang_seconds`: how long a
    process may take for one. `threads`: instead of one for each core.
    """

    workers: int
    images: int
    hang_seconds: float = 30.0
    threads: int | None = None


def reading_ahead(media: Media, workers: int, images: int, hang_seconds: float = 30.0) -> Ahead:
    """Object storage is read by many threads: it is far, and forked processes cannot share its
    client."""
    if isinstance(media, ObjectMedia):
        return Ahead(workers=0, images=images + MAX_THREADS, threads=MAX_THREADS)
    return Ahead(workers=workers, images=images, hang_seconds=hang_seconds)


def preprocess_ahead(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    ahead: Ahead,
) -> AbstractContextManager[Iterator[Preprocessed[list[Tensor]]]]:
    """Images in the order of `keys`; each is valid until the next one is asked for.

    Args:
        shapes: of the float32 tensors that `preprocess` returns.

    Rows whose image `load` or `preprocess` refuses carry the reason; `decoder-crash` and
    `decoder-hang` are those that cost a process its life.
    """
    if ahead.workers and can_fork():
        return _in_processes(keys, load=load, preprocess=preprocess, shapes=shapes, ahead=ahead)
    threads = ahead.threads or ahead.workers or min(MAX_THREADS, cpu_count() or 1)
    return in_threads(keys, load=load, preprocess=preprocess, threads=threads, ahead=ahead.images)


@contextmanager
def _in_processes(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], list[Tensor]],
    shapes: Sequence[tuple[int, ...]],
    ahead: Ahead,
) -> Iterator[Iterator[Preprocessed[list[Tensor]]]]:
    def work(position: int) -> tuple[list[Tensor] | None, str, RowError | None]:
        done = _attempt(keys[position], load, preprocess)
        return done.value, done.digest, done.error

    with open_processes(
        work,
        count=len(keys),
        shapes=shapes,
        workers=ahead.workers,
        ahead=ahead.images,
        hang_seconds=ahead.hang_seconds,
    ) as results:
        yield (
            _named(key, Preprocessed(value=result[0], digest=result[1], error=result[2]))
            for key, result in zip(keys, results, strict=True)
        )


def _named(key: str, done: Preprocessed[T]) -> Preprocessed[T]:
    """A decoder that died has not said over which image."""
    if done.error is None or done.error.reason not in LOST:
        return done
    return Preprocessed(
        value=None,
        digest="",
        error=RowError(done.error.reason, f"{key}: {done.error.detail}"),
    )


@contextmanager
def in_threads(
    keys: Sequence[str],
    load: Callable[[str], LoadedImage[Any]],
    preprocess: Callable[[LoadedImage[Any]], T],
    threads: int,
    ahead: int,
) -> Iterator[Iterator[Preprocessed[T]]]:
    """Pillow decodes and resizes without the interpreter's lock."""
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            yield _in_order(
                keys,
                work=lambda key: _attempt(key, load, preprocess),
                pool=pool,
                ahead=ahead,
            )
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_order(
    keys: Sequence[str],
    work: Callable[[str], Preprocessed[T]],
    pool: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[Preprocessed[T]]:
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
    except ApecacheError:  # of no row: the storage does not answer
        raise
    except (ValueError, OSError, RuntimeError) as error:
        return Preprocessed(value=None, digest="", error=RowError("unusable", f"{key}: {error}"))
