"""The native module in a process: one OpenMP runtime, fork, calls from several threads at once."""

import os
import sys
import threading

import pytest
import torch

from batchnorm.ops.activations import Activation
from batchnorm.ops.call import Epilogue
from support import processes

_native = pytest.importorskip("batchnorm._native")
from batchnorm.ops.backends import cpu  # noqa: E402

RELU = Activation("relu")

ALONE = """
import os, torch
from batchnorm.ops.activations import Activation
from batchnorm import _native
from batchnorm.ops.backends import cpu
from batchnorm.ops.call import Epilogue
relu = Activation("relu")
x = torch.randn(8, 64, 32, 32)
before = cpu.forward(x, Epilogue(act=relu), 1e-5, 1)
expected = before[0].numpy().tobytes()
pid = os.fork()
if pid == 0:
    after = cpu.forward(x, Epilogue(act=relu), 1e-5, 1)
    os._exit(0 if _native.in_forked_child() and after[0].numpy().tobytes() == expected else 1)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert not _native.in_forked_child()
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
loaded = {line.split()[-1] for line in maps.splitlines() if "gomp" in line or "libomp" in line or "iomp" in line}
assert len(loaded) <= 1, loaded
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_there_is_one_openmp_runtime_and_a_forked_child_runs_serially_and_does_not_hang():
    result = processes.run([sys.executable, "-c", ALONE])
    assert result.returncode == 0, result.stderr


def test_threads_may_call_at_once():
    x = torch.randn(16, 32, 28, 28)
    expected = cpu.forward(x, Epilogue(act=RELU), 1e-5, 1)
    wrong = []

    def work():
        for _ in range(20):
            got = cpu.forward(x, Epilogue(act=RELU), 1e-5, 1)
            if not all(torch.equal(a, b) for a, b in zip(expected, got)):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
