"""How the native module reads tensors, what it declines, and its threads in one or several processes."""

import concurrent.futures
import math
import os
import sys

import pytest
import torch

_native = pytest.importorskip("batchnorm._native")
from batchnorm.errors import UnservedError  # noqa: E402
from batchnorm.ops.activations import Activation  # noqa: E402
from batchnorm.ops.backends import cpu  # noqa: E402
from batchnorm.ops.call import Epilogue, RunningBuffers  # noqa: E402
from support import processes  # noqa: E402
from support.twins import assert_close  # noqa: E402


def misaligned(*shape, dtype=torch.float32):
    memory = torch.zeros(dtype.itemsize * math.prod(shape) + 1, dtype=torch.uint8)
    return torch.frombuffer(memory.numpy(), dtype=dtype, offset=1).view(shape)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({0: None}, TypeError, "torch.Tensor"),
        ({0: torch._efficientzerotensor((4, 3))}, ValueError, "no memory"),
        ({0: misaligned(4, 3)}, ValueError, "x is not aligned"),
        ({2: misaligned(3, dtype=torch.float64)}, ValueError, "mean is not aligned"),
        ({4: 0}, ValueError, "threads"),
    ],
)
def test_bad_calls_of_the_module_are_refused_and_name_what_is_wrong(changes, error, words):
    vector = torch.zeros(3, dtype=torch.float64)
    given = dict(enumerate((torch.zeros(4, 3), 1, vector, vector, 1))) | changes
    with pytest.raises(error, match=words):
        _native.moments(*given.values())


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.to("meta"),
        torch.Tensor.to_sparse,
        torch.Tensor.int,
        torch.Tensor.cfloat,
        lambda x: x[:, ::2],
    ],
)
def test_inputs_of_other_devices_layouts_and_dtypes_are_declined(cast):
    vector = torch.zeros(3, dtype=torch.float64)
    assert _native.moments(cast(torch.zeros(4, 3)), 1, vector, vector, 1) is False


def test_an_output_that_overlaps_the_input_is_refused():
    memory, vector = torch.zeros(15), torch.zeros(3)
    x, out = memory[:12].view(4, 3), memory[3:].view(4, 3)
    with pytest.raises(ValueError, match="overlap"):
        _native.normalize(x, None, None, None, vector, vector, 1, out, 0, 0.0, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.ones(5)},
        {"weight": torch.ones(4, dtype=torch.int64)},
        {"bias": torch.ones(4, 1)},
        {"residual": torch.ones(3, 1, 5, 5)},
        {"residual": torch.ones(3, 4, 5, 5, dtype=torch.float64)},
        {"mean": torch.zeros(5)},
        {"mean": torch.zeros(4, dtype=torch.bfloat16)},
        {"var": torch.ones(4, dtype=torch.float64)},
        {"var": None},
        {"mean": torch.zeros(8)[::2]},
        {"counter": torch.zeros((), dtype=torch.int32)},
        {"counter": torch.zeros(2, dtype=torch.int64)},
        {"axis": 4},
    ],
    ids=str,
)
def test_tensors_that_do_not_belong_together_are_declined_and_nothing_is_changed(change):
    x = torch.randn(3, 4, 5, 5)
    given = {
        "weight": torch.ones(4),
        "bias": torch.zeros(4),
        "residual": x.clone(),
        "mean": torch.zeros(4),
        "var": torch.ones(4),
        "counter": torch.zeros((), dtype=torch.int64),
        "axis": 1,
    } | change
    affine = [given.pop(name) for name in ("weight", "bias", "residual")]
    axis = given.pop("axis")
    before = [t if t is None else t.clone() for t in given.values()]
    if axis == 1:
        epilogue = Epilogue(*affine, Activation("relu"))
        with pytest.raises(UnservedError, match="expected tensors of shape"):
            cpu.forward(x, epilogue, 1e-5, axis, RunningBuffers(*given.values(), 0.1))
    assert (
        _native.forward(x, affine[2], *affine[:2], axis, *given.values(), 0, 0.0, 1e-5, 0.1, 1)
        is None
    )
    assert_close(list(given.values()), before, exact=True)


def test_a_negative_view_is_read_as_the_negative_of_its_memory():
    x, one = torch.randn(3, 4, 5, 5), torch.ones(4)
    negative, relu = torch._neg_view(x), Epilogue(act=Activation("relu"))
    found, expected = (cpu.forward(t, relu, 1e-5, 1) for t in (negative, -x))
    assert_close(found, expected, exact=True)
    y, _ = cpu.forward(x, Epilogue(torch._neg_view(one), None, negative), 1e-5, 1)
    expected, _ = cpu.forward(x, Epilogue(-one, None, -x), 1e-5, 1)
    assert torch.equal(y, expected)


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
    call = lambda *_: cpu.forward(x, Epilogue(act=RELU), 1e-5, 1)
    expected = call()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(call, range(80)):
            assert_close(found, expected, exact=True)
