"""Processes that a test starts and that end with it, whatever ends the test."""

import contextlib
import os
import signal
import subprocess


@contextlib.contextmanager
def started(command, **options):
    """The process of a command; at the end of the block its whole group of processes is killed."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [str(word) for word in command]
    before = signal.getsignal(signal.SIGINT)
    # A process inherits an ignored SIGINT from its parent; what a test starts has to obey it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            words, text=True, encoding="utf-8", start_new_session=True, **pipes, **options
        )
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        try:
            yield process
        finally:
            _kill(process)


def run(command, timeout=280, **options):
    """What ``subprocess.run`` returns, as text; nothing of it is left running."""
    with started(command, **options) as process:
        out, errors = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _kill(process):
    if os.name == "nt":
        process.kill()
        return
    # The group outlives its first process where that one left children behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
