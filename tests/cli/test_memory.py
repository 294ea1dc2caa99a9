"""Freed memory is kept for the next batch where the C library can."""

import subprocess
import sys

import pytest

CODE = """
import resource, sys
from apecache_cli.memory import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else False)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_large_buffers_are_not_asked_for_page_by_page_again() -> None:
    told = {}
    for how in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", CODE, how],
            capture_output=True,
            text=True,
            check=True,
        )
        kept, count = done.stdout.split()
        told[how] = int(count)
        if how == "keep" and kept == "False":
            pytest.skip("another C library than glibc")
    assert told["keep"] < told["leave"] / 10
