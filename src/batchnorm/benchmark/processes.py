"""Function calls in fresh processes that share an allocator.

A server process is started with the environment of a memory regime; it imports what a call needs
and forks for every call. So each call begins with the same heap, without the seconds of an import.
In a forked process our kernels use one thread (``native/parallel.hpp``): calls that need more are
made in spawned processes, which import everything anew.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch

from batchnorm.benchmark.regimes import variables

Call = Callable[..., Any]


class ChildError(RuntimeError):
    """A call failed in its process; the message holds the traceback there."""


@contextlib.contextmanager
def processes(regime: str, threads: int) -> Iterator[Call]:
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

    def call(function: Call, *args: Any) -> Any:
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


def _answer(pipe: Connection, threads: int, function: Call, args: tuple[Any, ...]) -> None:
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
