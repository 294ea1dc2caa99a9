"""Let folder and file modes bind a test that runs as root."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

OVERRIDES = (1 << 1) | (1 << 2)
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of capabilities(7): with them modes do not bind."""
VERSION_3 = 0x20080522
EFFECTIVE = 0
"""Position of the low word of the effective set among six words, as capset(2) orders them."""


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


@contextmanager
def modes_bind() -> Iterator[None]:
    """Take the right to ignore modes from this thread, and from threads that it starts."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    # Process 0 is the calling thread.
    header = _Header(VERSION_3, 0)
    words = (ctypes.c_uint32 * 6)()
    _require_done(libc.capget(ctypes.byref(header), words))
    before = words[EFFECTIVE]
    words[EFFECTIVE] = before & ~OVERRIDES
    _require_done(libc.capset(ctypes.byref(header), words))
    try:
        yield
    finally:
        words[EFFECTIVE] = before
        _require_done(libc.capset(ctypes.byref(header), words))


def _require_done(status: int) -> None:
    if status != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
