"""Runs tests against a changed copy of the sources, in forks of a process that has loaded torch.

An editable install maps ``batchnorm`` to the sources of the checkout, whatever ``sys.path`` says.
Therefore each fork removes the finder of the install, and then imports the copy.
"""

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import numpy as np  # noqa: F401 (as torch: loaded once, for all forks)
import pytest
import torch

ROOT = Path(__file__).parents[2]
SECONDS, OF_PROCESSOR = 1800, 150  # against endless loops; wall-clock time includes pauses


@contextmanager
def copied() -> Iterator[Path]:
    """Yield a copy of ``src``, with the installed native module."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        for place in map(Path, sys.path):
            for native in place.glob("batchnorm/_native*.so"):
                shutil.copy(native, source / "batchnorm")
        passes(source, ["tests/architecture/test_map.py"])
        yield source


def passes(source: Path, tests: Sequence[str]) -> None:
    """Raise unless tests pass without a change: otherwise they would fail for every change.

    Raises:
        RuntimeError: If they fail or do not run.
    """
    how = fails(source, tests)
    if how:
        raise RuntimeError(f"without a change: {how}: {' '.join(tests)}")


def fails(source: Path, tests: Sequence[str], plugins: Sequence[object] = ()) -> str:
    """Return how tests of the fast suite fail against a copy, or "" if they pass."""
    torch.set_num_threads(1)
    sys.stdout.flush()
    process = os.fork()
    if not process:
        try:
            os._exit(_run(source, tests, plugins))
        finally:  # skips cleanup of what the parent has set up
            os._exit(pytest.ExitCode.INTERNAL_ERROR)
    return outcome(process)


def outcome(process: int) -> str:
    """Wait for a process of pytest; return how tests failed in it, or "" if all passed."""
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError("no tests were collected")
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return {0: "", 1: "failed"}.get(status, "did not run")


def limit(seconds: float = OF_PROCESSOR) -> None:
    """End this process after ``SECONDS``, or after ``seconds`` more of CPU time."""
    signal.alarm(SECONDS)
    most = int(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))


def _run(source: Path, tests: Sequence[str], plugins: Sequence[object]) -> int:
    if not plugins:
        limit()
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True
    sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in type(f).__module__]
    sys.path.insert(0, str(source))
    os.environ["PYTHONPATH"] = str(source)  # for processes that tests start
    # A failure is enough: hypothesis need not shrink its example.
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("first failure", phases=phases, database=None)
    hypothesis.settings.load_profile("first failure")
    options = ["-x", "-q", "-n", "0", "--timeout", "0", "-W", "ignore:Module already imported"]
    marks = ["-m", "not slow and not audit and not cuda"]
    return pytest.main([*options, *marks, *tests], plugins=list(plugins))
