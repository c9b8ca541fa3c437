"""Memory regimes of the CPU: what the process's allocator does with memory that is freed.

``default``: the C library as it is. glibc returns large freed blocks to the kernel, so that the
next step gets fresh pages, each of which the kernel clears on the first write (a page fault).
``kept``: an allocator that keeps freed pages. tcmalloc is preloaded where the dynamic linker finds
it (Debian: ``libtcmalloc-minimal4``); PyTorch's tuning guide advises it for CPUs. Elsewhere glibc's
tunables tell it to map nothing separately and to return nothing.
"""

import ctypes.util
import os
import platform
import sys
from pathlib import Path

from batchnorm.errors import OptionError

DEFAULT, KEPT = REGIMES = ("default", "kept")

_TCMALLOC = ("tcmalloc_minimal", "tcmalloc")
_TUNABLES = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**62}"


def variables(regime: str) -> dict[str, str]:
    """Return the environment variables with which a process starts in a regime.

    Raises:
        OptionError: If there is no such regime, or this system has no way to it.
    """
    if regime not in REGIMES:
        raise OptionError(f"expected a memory regime of {', '.join(REGIMES)}; got {regime!r}")
    if regime == DEFAULT:
        return {}
    if platform.system() != "Linux":
        raise OptionError(
            "the memory regime 'kept' preloads tcmalloc or sets glibc's tunables, which needs "
            f"Linux; this is {platform.system()}: measure with regime 'default'"
        )
    for name in _TCMALLOC:
        if found := ctypes.util.find_library(name):
            others = os.environ.get("LD_PRELOAD", "").split()
            return {"LD_PRELOAD": " ".join(dict.fromkeys([found, *others]))}
    if platform.libc_ver()[0] == "glibc":
        return {"GLIBC_TUNABLES": _TUNABLES}
    raise OptionError(
        "the memory regime 'kept' needs tcmalloc or glibc; this system has neither: install "
        "tcmalloc (gperftools), or measure with regime 'default'"
    )


def enter(regime: str) -> None:
    """Start this script again in a regime, unless it runs with the variables of that already.

    Raises:
        OptionError: If the regime cannot be had here.
    """
    wanted = variables(regime)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)  # noqa: S606


def allocator() -> str:
    """Return which allocator this process runs with, as its memory map and variables show."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in loaded:
            return name
    libc = platform.libc_ver()[0] or platform.system()
    return f"{libc} that keeps pages" if os.environ.get("GLIBC_TUNABLES") == _TUNABLES else libc
