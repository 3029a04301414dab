"""Settings of the host process, each tried in a process of its own."""

import subprocess
import sys

import pytest

from common.cpu_heap import _glibc

pytestmark = pytest.mark.skipif(_glibc() is None, reason="needs Linux with glibc")


def run(code: str) -> list[int]:
    """The numbers that `code` prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


FRAGMENTS = """
import ctypes
import numpy as np
from common.cpu_heap import _glibc, keep_freed_memory, set_fragments_aside
keep_freed_memory()
libc = _glibc()
sizes = [40_000 + 64 * (i % 1000) for i in range(2000)]
blocks = [libc.malloc(size) for size in sizes]
kept = np.arange(1_000_000)
for block in blocks[::2]:
    libc.free(block)  # holes between blocks that are in use
holes = set(blocks[::2])
"""


def test_fragments_are_set_aside():
    code = (
        FRAGMENTS
        + "print(set_fragments_aside(), sum(sizes[::2]), int(libc.malloc(45_000) in holes))"
    )
    aside, holes, reused = run(code)
    assert aside > 0.9 * holes
    assert not reused


def test_what_is_in_use_stays_as_it_was():
    code = FRAGMENTS + (
        "used = blocks[1::2]\n"
        "for block, size in zip(used, sizes[1::2]): ctypes.memset(block, 7, size)\n"
        "set_fragments_aside()\n"
        "whole = [ctypes.string_at(b, s) == bytes([7]) * s for b, s in zip(used, sizes[1::2])]\n"
        "print(int(all(whole)), int((kept == np.arange(1_000_000)).all()))"
    )
    assert run(code) == [1, 1]


def test_without_kept_memory_nothing_is_set_aside():
    assert run(FRAGMENTS.replace("keep_freed_memory()", "") + "print(set_fragments_aside())") == [0]


def test_freed_blocks_are_reused():
    code = """
import resource
import numpy as np
from common.cpu_heap import keep_freed_memory
keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(50_000_000, np.uint8)
before = faults()
for _ in range(5):
    np.ones(50_000_000, np.uint8)
print(faults() - before)
"""
    assert run(code)[0] < 5000  # of 5 x 12,207 pages


def test_the_heap_keeps_more_than_two_gib():
    """Address space only: nothing of it is touched."""
    code = (
        "from common.cpu_heap import _glibc, keep_freed_memory\n"
        "keep_freed_memory()\n"
        "libc = _glibc()\n"
        "block = libc.malloc(5 << 29)\n"
        "end = libc.sbrk(0)\n"
        "libc.free(block)\n"
        "print(libc.sbrk(0) - end)"
    )
    assert run(code) == [0]
