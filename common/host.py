"""Settings of the host process that make CPU work faster."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


def keep_freed_memory() -> None:
    """Makes glibc's malloc keep large freed blocks for the next request instead of returning them to the kernel.

    XLA's CPU backend allocates each step's temporaries anew; by default every one of their pages is then faulted in again,
    which took 20 to 40 % of a step's CPU time where it was measured (experiments/LOG.md). Call it before jax computes
    anything. Does nothing elsewhere than on Linux with glibc.
    """
    if sys.platform != "linux":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)  # large blocks come from the heap, not from a mapping of their own
    mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)  # and the heap does not shrink
    mallopt(_M_ARENA_MAX, 1)  # one heap, so that any thread finds what another freed
