"""Tests leave no process behind, whatever they start and however they end."""

import os
import re
import sys
import time
from pathlib import Path

import pytest

from support import processes

TESTS = Path(__file__).parents[1]
# A process that starts another one of the given name and waits; both would run for ten minutes.
PARENT = "import subprocess, sys; subprocess.run(['sleep', '600.%s' % sys.argv[1]])"

posix = pytest.mark.skipif(os.name == "nt", reason="groups of processes are POSIX")


def sleeping(name):
    """Ids of the processes ``sleep 600.name``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it has ended
            continue
        found += [path.parent.name] if words[:2] == [b"sleep", b"600.%d" % name] else []
    return found


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def _failing(name):
    with processes.started([sys.executable, "-c", PARENT, name]):
        assert wait_for(lambda: sleeping(name))
        pytest.fail("the test fails")


@posix
@pytest.mark.skipif(not os.path.exists("/proc/self/cmdline"), reason="no /proc here")
def test_a_started_process_and_its_children_end_when_the_test_fails():
    name = os.getpid()
    with pytest.raises(pytest.fail.Exception, match="the test fails"):
        _failing(name)
    assert wait_for(lambda: not sleeping(name))


IGNORING = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, sys.argv[1])
from support import processes
code = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
print(processes.run([sys.executable, "-c", code]).stdout.strip())
"""


@posix
def test_a_started_process_obeys_interrupts_where_the_tests_ignore_them():
    """SIGINT that a parent ignores stays ignored in its children, unless it is set back."""
    assert processes.run([sys.executable, "-c", IGNORING, TESTS]).stdout == "True\n"


def test_processes_that_may_outlive_a_test_are_started_by_helpers_that_end_them():
    """``subprocess.run`` kills its process itself; ``Popen`` and multiprocessing do not."""
    alone = {
        path.name
        for path in TESTS.rglob("*.py")
        if re.search(r"\bPopen\(|\.Process\(|multiprocessing\.start_processes\(", path.read_text())
    }
    # Each of them kills in a finally.
    assert alone == {"processes.py", "ranks.py"}
