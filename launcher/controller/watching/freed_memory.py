"""What windows of many ranks leave behind in the C library's heap goes back to the machine.

Summaries of thousands of ranks come and go in pieces of some kilobytes, between others that stay. glibc gives back by itself
what is free at the end of its heap alone: of 12,288 ranks 200 MB stay free in the middle of it.
"""

import ctypes
import functools

_MUCH_BYTES = 32 << 20
"""Free, from which on it is given back; that takes some milliseconds."""


class _Heap(ctypes.Structure):
    """``struct mallinfo2``; see mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def give_back() -> None:
    """Give free memory back, where there is much. Nothing where the C library is not glibc 2.33 or newer."""
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks >= _MUCH_BYTES:
        library.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None)
    if not (hasattr(library, "mallinfo2") and hasattr(library, "malloc_trim")):
        return None
    library.mallinfo2.restype = _Heap
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library
