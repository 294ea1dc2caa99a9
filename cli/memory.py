"""How this process gives memory back, for commands that allocate the same large buffers again and
again."""

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed for the next batch, instead of asking the system for fresh
    pages, which it must clear, for every activation of a network above 32 MB: on a CPU a quarter of
    efficientnet-lite0's time.

    False where there is no such setting (other systems and C libraries): everything works as
    before.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
        return bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
    except (OSError, AttributeError):
        return False
