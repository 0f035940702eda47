"""Give freed memory of the C heap back to the system.

glibc keeps what was freed between two allocations that stay, and takes blocks of up to 32 MiB from there once one of
that size has been freed. Work that allocates and frees much, then allocates little that stays, leaves holes that only
allocations of the same sizes fill again. A trim hands the whole pages of all holes back; it changes no setting.
"""

import ctypes
import sys


def trim_heap() -> None:
    """Hand free pages back where the C library can do so, which is glibc."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(ctypes.c_size_t(0))
