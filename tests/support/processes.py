"""Child processes of a test, which are killed when the test ends, also by an error."""

import contextlib
import os
import signal
import subprocess


@contextlib.contextmanager
def started(command, **options):
    """Start a command; at the end of the block, kill its whole process group."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    words = [str(word) for word in command]
    before = signal.getsignal(signal.SIGINT)
    # A child would inherit an ignored SIGINT, but processes of tests must react to it.
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
    """Like ``subprocess.run`` in text mode, but leaves no process of the command running."""
    with started(command, **options) as process:
        out, errors = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def _kill(process):
    if os.name == "nt":
        process.kill()
        return
    # If the first process left children, the group still exists after it has ended.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
