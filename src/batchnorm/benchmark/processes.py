"""Function calls in new processes, which start in a memory regime of the CPU.

A regime determines what the allocator does with freed memory. ``default``: the C library's
behaviour. glibc returns large freed blocks to the kernel, so the next step gets new pages, each of
which the kernel clears at the first write (a page fault). ``kept``: an allocator that keeps freed
pages. tcmalloc is preloaded if the dynamic linker finds it (Debian: ``libtcmalloc-minimal4``);
PyTorch's tuning guide recommends it for CPUs. Otherwise glibc's tunables disable separate mappings
and trimming.

A server process is started with the environment of a regime; it imports the modules that a call
needs and forks for every call. So each call starts with the same heap, without the import time. In
a forked process our kernels use one thread (``native/parallel.hpp``), so calls with more threads
run in spawned processes, which import everything again.
"""

import contextlib
import ctypes.util
import multiprocessing
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from batchnorm.errors import OptionError

DEFAULT, KEPT = REGIMES = ("default", "kept")

_TCMALLOC = ("tcmalloc_minimal", "tcmalloc")
_TUNABLES = f"glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**62}"


def variables(regime: str) -> dict[str, str]:
    """Return the environment variables with which a process starts in a regime.

    Raises:
        OptionError: If the regime is unknown, or not available on this system.
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
    """Restart this script in a regime, unless its environment variables are already set.

    Raises:
        OptionError: If the regime is not available here.
    """
    wanted = variables(regime)
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | wanted)  # noqa: S606


def allocator() -> str:
    """Return the allocator of this process, from its memory map and environment variables."""
    maps = Path("/proc/self/maps")
    loaded = maps.read_text() if maps.exists() else ""
    for name in ("tcmalloc", "jemalloc", "mimalloc"):
        if name in loaded:
            return name
    libc = platform.libc_ver()[0] or platform.system()
    return f"{libc} that keeps pages" if os.environ.get("GLIBC_TUNABLES") == _TUNABLES else libc


Function = Callable[..., Any]


class ChildError(RuntimeError):
    """A call failed in its process; the message has the traceback."""


@contextlib.contextmanager
def processes(regime: str, threads: int) -> Iterator[Function]:
    """Yield ``call(function, *args)``, which runs a module-level function in a separate process.

    Args:
        regime: The memory regime of the processes.
        threads: Number of torch's threads; with more than one, processes are not forked.

    Raises:
        OptionError: If the regime is not available here.
        ChildError: From ``call``, if the function raised or its process died.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(there, threads))
    with _environment(variables(regime)):
        server.start()
    there.close()

    def call(function: Function, *args: Any) -> Any:
        here.send((function, args))
        try:
            done, found = here.recv()
        except EOFError:
            raise ChildError("the server process has ended; was memory short?") from None
        if not done:
            raise ChildError(found)
        return found

    try:
        yield call
    except BaseException:
        server.terminate()  # also ends a running call
        raise
    finally:
        here.close()
        server.join()


def _serve(pipe: Connection, threads: int) -> None:
    forks = threads == 1 and "fork" in multiprocessing.get_all_start_methods()
    method = "fork" if forks else "spawn"
    # Ctrl-C is sent to every process of the terminal; the caller handles it and ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    context = multiprocessing.get_context(method)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        child = context.Process(target=_answer, args=(pipe, threads, function, args))  # type: ignore[attr-defined]
        child.daemon = True
        child.start()
        child.join()
        if child.exitcode:
            pipe.send((False, f"the process of {function.__name__} ended with {child.exitcode}"))


def _answer(pipe: Connection, threads: int, function: Function, args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    try:
        found = True, function(*args)
    except BaseException:  # noqa: BLE001 (an exit too is told to the caller)
        found = False, traceback.format_exc()
    pipe.send(found)


@contextlib.contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
