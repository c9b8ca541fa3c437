"""Function calls in fresh processes, which start in a memory regime of the CPU.

A regime is what the process's allocator does with memory that is freed. ``default``: the C library
as it is. glibc returns large freed blocks to the kernel, so that the next step gets fresh pages,
each of which the kernel clears on the first write (a page fault). ``kept``: an allocator that keeps
freed pages. tcmalloc is preloaded where the dynamic linker finds it (Debian:
``libtcmalloc-minimal4``); PyTorch's tuning guide advises it for CPUs. Elsewhere glibc's tunables
tell it to map nothing separately and to return nothing.

A server process is started with the environment of a regime; it imports what a call needs and forks
for every call. So each call begins with the same heap, without the seconds of an import. In a
forked process our kernels use one thread (``native/parallel.hpp``): calls that need more are made
in spawned processes, which import everything anew.
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


Function = Callable[..., Any]


class ChildError(RuntimeError):
    """A call failed in its process; the message holds the traceback there."""


@contextlib.contextmanager
def processes(regime: str, threads: int) -> Iterator[Function]:
    """Yield ``call(function, *args)``, which runs a function of a module in a process of its own.

    Args:
        regime: The memory regime of the processes.
        threads: How many torch uses there; for more than one the processes are not forked.

    Raises:
        OptionError: If the regime cannot be had here.
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
        server.terminate()  # and with it a call that was being made
        raise
    finally:
        here.close()
        server.join()


def _serve(pipe: Connection, threads: int) -> None:
    forks = threads == 1 and "fork" in multiprocessing.get_all_start_methods()
    method = "fork" if forks else "spawn"
    # Ctrl-C reaches every process of the terminal; the caller hears it and ends this one.
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
