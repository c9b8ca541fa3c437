"""What this process does with memory that was freed."""

import ctypes
import platform

# Parameters of glibc's mallopt, by number as in malloc.h. Some versions refuse a high threshold for
# mapping, so no block is mapped by itself. A threshold for trimming that was set is not moved any
# more, so it goes back to where glibc itself would have moved it for large blocks.
_TRIM_THRESHOLD, _NEVER, _LARGE = -1, -1, 64 << 20
_MMAP_MAX, _NONE, _AS_BUILT = -4, 0, 65536


def recycle_memory(on: bool = True) -> bool:
    """Let this process keep the memory that it frees, for the tensors to come.

    On the CPU, tensors of torch and outputs of our layers come from the C library, which maps large
    blocks anew and gives back what is free at the end of its heap. So every step waits for pages
    that the system has to clear first, whichever layers the network has. With this setting the
    process stays as large as it has ever been, and may grow beyond that, by the holes that blocks
    of other sizes leave in the heap.

    This is a setting of the C library (``mallopt``) and holds for the whole process. The variables
    ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_``, set to more than there is memory, do
    the same from its start.

    Args:
        on: False gives back what is free now, and from then on what is freed.

    Returns:
        Whether the C library can be told so: True with glibc, False and nothing done elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    told = libc.mallopt(_MMAP_MAX, _NONE if on else _AS_BUILT)
    told &= libc.mallopt(_TRIM_THRESHOLD, _NEVER if on else _LARGE)
    if not on:
        libc.malloc_trim(0)
    return bool(told)
