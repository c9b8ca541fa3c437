"""The way from a call to the GPU, walked on a machine without one: see ``ahead``.

Only addresses of tensors are looked at, so that large ones cost no memory: nothing writes to them.
"""

import os
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs TRITON_INTERPRET unset", allow_module_level=True)

from support import ahead, oracle

if ahead.missing():
    pytest.skip(ahead.missing(), allow_module_level=True)

from batchnorm.benchmark import cases
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from support.combinations import each


def tensor(shape, last=False, dtype=torch.bfloat16):
    if not last:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)


def step(x, act="relu", adds=True, momentum=0.1):
    """What a layer calls in a training step and then in evaluation."""
    channels = x.shape[1]
    weight, bias, mean, var = (torch.empty(channels) for _ in range(4))
    running = RunningBuffers(mean, var, torch.empty((), dtype=torch.int64), momentum)
    act, r = Activation(act), x if adds else None
    y, stats = cuda.forward(x, Epilogue(weight, bias, r, act), 1e-5, 1, running)
    saved = ForBackward(x, stats, oracle.beside(act, r, y), act, 1)
    cuda.backward(y, saved, adds)
    cuda.evaluate(x, mean, var, Epilogue(weight, bias, r, act), 1e-5, 1)
    sums = cuda.backward_sums(y, saved)
    cuda.backward_input(y, saved, *sums, x.numel() / channels, adds)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *(shape for shape in cases.CUDA_SHAPES if len(shape) > 2),
        (1, 1),
        (5, 1, 3),
        (3, 100_000),
        (70_000, 3),
        (2, 100_000, 3, 3),
        (70_000, 65_537),
        (700, 64, 224, 224),
        (3_000_000_000, 1),
        (1, 1, 3_000_000_000),
    ],
    ids=str,
)
def test_launches_that_a_gpu_accepts(shape, last):
    """Nothing is refused, and the programs that share a reduction can all start at once."""
    with ahead.launches() as found:
        step(tensor(shape, last))
    for one in found:
        assert prod(one.grid) < 2**31
        if one.name in ("moments_kernel", "sums_kernel") and prod(one.grid) <= 2 * 132:
            # Two of them on a multiprocessor of 227 KiB and 65536 registers.
            assert 2 * one.shared <= 227 * 1024, (one.name, one.shared)
            assert 2 * one.registers * one.warps * 32 <= 65536, (one.name, one.registers)


@each(channels=[1, 8, 513, 8192], dtype=[torch.bfloat16, torch.float32])
def test_tiles_of_every_size_compile(channels, dtype):
    """From a single value up; Triton fails at some that look no different from others."""
    for samples in (1, 3, 8, 250):
        with ahead.launches() as found:
            step(tensor((samples, channels), dtype=dtype))
            step(tensor((samples, min(channels, 8), 7, 7), dtype=dtype))
        assert found


def test_what_changes_from_step_to_step_compiles_nothing():
    """Sizes and momentum are arguments of the kernels."""
    with ahead.launches() as first:
        step(tensor((256, 64, 56, 56), True))
    with ahead.launches() as later:
        step(tensor((512, 64, 56, 56), True), momentum=0.25)
    assert {one.hash for one in later} <= {one.hash for one in first}


def test_a_network_compiles_few_kernels():
    """All of ResNet-50's layers together, at a third of a second each on one core."""
    with ahead.launches() as found:
        for shape, both in cases.CUDA_SHAPES.items():
            if both and shape[0] == 256:
                for adds in (False, True):
                    step(tensor(shape, True), adds=adds)
    assert len({one.hash for one in found}) <= 64


class Called(TorchDispatchMode):
    """Records which of torch's operations are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("shape", [(256, 512), (8, 64, 56, 56)], ids=str)
def test_a_call_is_nothing_but_memory_of_torch_and_launches(shape):
    """So it can be captured in a graph: nothing is read back, copied or computed on the way."""
    x, called = tensor(shape), Called()
    with ahead.launches() as found, called:
        step(x)
    assert found
    assert called.names <= {"empty", "empty_like", "select", "slice", "alias", "detach"}
