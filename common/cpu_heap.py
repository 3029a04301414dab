"""Settings of this process's heap that make work on CPU faster. For launchers: no library calls them."""

import ctypes
import mmap
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h
_MADV_DONTNEED = 4  # mman.h
_SIZES = [1 << bits for bits in range(24, 9, -1)]  # 16 MiB to 1 KiB
_ROOM = 256 << 20


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep large freed blocks for the next request instead of returning them to the kernel.

    XLA's CPU backend allocates the temporaries of each step again; by default all their pages are then faulted in again,
    which took 20 to 40 % of a step's CPU time where it was measured (docs/journal.md). Call it before jax computes
    anything. Does nothing elsewhere than on Linux with glibc.
    """
    libc = _glibc()
    if libc is None:
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap, not from a mapping of their own
    # And the heap never shrinks: the largest int as a threshold would let go of what is beyond 2 GiB.
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_ARENA_MAX, 1)  # one heap, so that any thread finds what another freed


def set_fragments_aside() -> int:
    """Takes the small free blocks that compiling leaves all over the heap out of malloc's sight. Returns their bytes.

    LLVM leaves some 70,000 of them, of as many sizes, and malloc looks through lists of them, sorted by size, whenever a
    product asks for its workspace: 15 % of a step's CPU time and more (docs/journal.md). Call it once a long run's
    programs are compiled. What is set aside is never used again; its whole pages go back to the kernel. Does
    nothing unless `keep_freed_memory` was called before.
    """
    libc = _glibc()
    if libc is None:
        return 0
    room = libc.malloc(_ROOM)
    if not room or room >= libc.sbrk(0):  # not on the heap: memory is not kept
        libc.free(room)
        return 0
    libc.malloc(_SIZES[0])  # between the room and the heap's end, never freed
    aside = 0
    for size in _SIZES:
        # Blocks beyond the room are no fragments: the heap was extended for them.
        while (block := libc.malloc(size) or room) < room:
            first = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
            pages = (block + size - first) // mmap.PAGESIZE
            if pages > 0:
                libc.madvise(first, pages * mmap.PAGESIZE, _MADV_DONTNEED)
            aside += size
        if block != room:
            libc.free(block)
    # Small requests find room here, rather than at the start of the step's own block, which would then be too small.
    libc.free(room)
    return aside


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc: its malloc is the one that the settings are for."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return None
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
