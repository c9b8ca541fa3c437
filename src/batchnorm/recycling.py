"""``bn.recycle_memory``: settings of glibc's malloc that keep freed memory in the process."""

import ctypes
import platform

# Parameters of glibc's mallopt, numbered as in malloc.h. Some versions refuse a large mmap
# threshold, so the number of mapped blocks is limited to 0 instead. Once the trim threshold has
# been set, glibc no longer adjusts it, so ``on=False`` sets the value to which glibc raises it for
# large blocks.
_TRIM_THRESHOLD, _NEVER, _LARGE = -1, -1, 64 << 20
_MMAP_MAX, _NONE, _AS_BUILT = -4, 0, 65536


def recycle_memory(on: bool = True) -> bool:
    """Make glibc keep freed memory in this process, so that new tensors reuse it.

    By default glibc maps large blocks with ``mmap`` and returns free memory at the end of its heap
    to the kernel. Every training step then causes page faults for new, zeroed pages, with any
    network. With this setting (``mallopt``: no trimming, no ``mmap``) freed memory is reused. The
    process keeps its peak memory, and fragmentation can increase it.

    The setting applies to the whole process. The environment variables ``MALLOC_TRIM_THRESHOLD_``
    and ``MALLOC_MMAP_THRESHOLD_``, set to more bytes than there is memory, have the same effect
    from the start of the process.

    Args:
        on: False restores glibc's behaviour and returns free memory to the kernel.

    Returns:
        True with glibc; False, with nothing changed, with other C libraries.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    accepted = libc.mallopt(_MMAP_MAX, _NONE if on else _AS_BUILT)
    accepted &= libc.mallopt(_TRIM_THRESHOLD, _NEVER if on else _LARGE)
    if not on:
        libc.malloc_trim(0)
    return bool(accepted)
