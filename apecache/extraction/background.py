"""Commit shards in a thread of their own, while the next shard is encoded."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundCommits:
    """Run one commit at a time beside the encoding, in the order of the shards.

    The queue holds one shard: the next commit begins after the one before has ended. An error of a
    commit is raised at the next call, or at the end. When the encoding fails or is interrupted, the
    commit that has begun is completed first.

    Example:
        with BackgroundCommits() as commits:
            commits.put(commit, finished)
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._running: Future[None] | None = None
        self._finished: Callable[[], None] = lambda: None

    def put(self, commit: Callable[[], None], finished: Callable[[], None]) -> None:
        """Begin a commit, once the one before has ended.

        Args:
            commit: runs in the thread.
            finished: runs in the calling thread once the commit is known to have ended.

        Raises whatever the commit before raised.
        """
        self.wait()
        self._running = self._thread.submit(commit)
        self._finished = finished

    def wait(self) -> None:
        """Wait for the commit that has begun. Raises whatever it raised."""
        running = self._running
        if running is None:
            return
        running.result()
        self._running = None
        self._finished()

    def __enter__(self) -> "BackgroundCommits":
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.wait()
        finally:
            self._thread.shutdown(wait=True)
        # The commit is of earlier rows than the encoding that failed, so its error comes first.
        if isinstance(error, Exception) and self._running is not None:
            commit_error = self._running.exception()
            if commit_error is not None and commit_error is not error:
                raise commit_error
