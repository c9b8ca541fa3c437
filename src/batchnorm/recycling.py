"""What this process does with memory that was freed."""

import ctypes
import platform

# Parameters of glibc's mallopt, by number as in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_MAPPED_FROM = 1 << 30
_AS_BUILT = 128 << 10


def recycle_memory(on: bool = True) -> bool:
    """Let this process keep the memory that it frees, for the tensors to come.

    On the CPU torch takes memory for tensors from the C library, which maps large ones anew and
    gives back what is free at the end of its heap. So every step waits for pages that the system
    has to clear first, whichever layers the network has. The outputs of our own layers are recycled
    in any case; this is for all others. The process then stays as large as it has ever been;
    single tensors of 1 GiB or more are given back all the same.

    This is a setting of the C library and holds for the whole process. The variables
    ``MALLOC_TRIM_THRESHOLD_`` and ``MALLOC_MMAP_THRESHOLD_`` do the same from its start.

    Args:
        on: False gives back what is free now, and from then on what is freed.

    Returns:
        Whether the C library can be told so: True with glibc, False and nothing done elsewhere.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _MAPPED_FROM if on else _AS_BUILT)
    libc.mallopt(_TRIM_THRESHOLD, -1 if on else _AS_BUILT)
    if not on:
        libc.malloc_trim(0)
    return True
