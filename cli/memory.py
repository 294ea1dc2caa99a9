"""Memory that this process keeps, for commands that allocate the same large buffers repeatedly."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next batch.

    By default it asks the system for new pages, which are cleared first, for every activation above
    32 MB. On a CPU this is a quarter of efficientnet-lite0's time.

    Returns:
        False where there is no such setting (other systems and C libraries): nothing changes there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        # No mmap for large blocks, and no return of free memory at the end of the heap.
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False
