"""The kernels compiled for a GPU that is not there, by ptxas, and launched as on it: see ``ahead``."""

import os
import re
from math import prod

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs TRITON_INTERPRET unset", allow_module_level=True)

from support import ahead

if ahead.missing():
    pytest.skip(ahead.missing(), allow_module_level=True)

from batchnorm.benchmark import cases
from batchnorm.ops.activations import NAMES
from support.combinations import each

# 80 s on two cores; make test-triton runs them, and test-slow where torch has brought its Triton.
pytestmark = pytest.mark.slow

SHAPES = {
    "dense": ((64, 96), False),
    "dense, large": ((8192, 1024), False),
    "channels-last": ((8, 64, 56, 56), True),
    "channels-last, odd": ((8, 24, 28, 28), True),
    "33 channels": ((32, 33, 28, 28), True),
    "planes": ((32, 64, 56, 56), False),
    "planes, small": ((8, 64, 7, 7), False),
    "planes, odd": ((4, 8, 99, 99), False),
}
HOPPER, AMPERE = 90, 80
# Bytes of a thread's stack: ptxas spends 8 here and there to end at 64 or 128 registers.
FEW = 16


def compiled(layout, dtype, *of_step, capability=HOPPER, offset=0, **options):
    """What a training step and an evaluation launch."""
    shape, last = SHAPES[layout]
    x = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    with ahead.launches(capability) as found:
        ahead.step(x, *of_step, **options)
    return found


# Each layout with two of the dtypes: a kernel takes the third of a second to be compiled.
@each(
    layout=[name for name in SHAPES if name != "33 channels"] * 2,
    dtype=[torch.bfloat16, torch.float32, torch.float16],
)
def test_every_layout_compiles_for_hopper_and_spills_next_to_nothing(layout, dtype):
    for one in compiled(layout, dtype):
        assert one.spilled <= FEW, one
        # Two programs of a kernel on a multiprocessor of 227 KiB.
        assert one.shared <= 110 * 1024, (one.name, one.shared)
        assert one.registers * one.warps * 32 <= 65536, (one.name, one.registers)


@each(act=NAMES, adds=[False, True])
def test_every_activation_compiles(act, adds):
    assert all(one.spilled <= FEW for one in compiled("dense", torch.float32, act, adds))


def test_float64_and_parameters_of_other_dtypes_compile():
    assert compiled("planes, small", torch.float64, "tanh", parameters=torch.float64)
    assert compiled("dense, large", torch.bfloat16, "silu", parameters=torch.bfloat16)


PASSES = ("normalize_kernel", "moments_kernel", "sums_kernel", "input_kernel")


@pytest.mark.parametrize("layout", ["channels-last", "planes"])
def test_kernels_compile_for_an_older_gpu(layout):
    assert all(one.spilled <= FEW for one in compiled(layout, torch.float16, capability=AMPERE))


@pytest.mark.parametrize(
    "layout", ["dense, large", "channels-last", "planes", "channels-last, odd", "33 channels"]
)
def test_tiles_are_read_16_bytes_at_a_time_and_copied_ahead(layout):
    found = {one.name: one for one in compiled(layout, torch.bfloat16)}
    assert {found[name].widest_load for name in PASSES} == {16}
    if layout in ("dense, large", "channels-last", "planes"):
        assert found["moments_kernel"].pipelined
        assert found["sums_kernel"].pipelined


@pytest.mark.parametrize("layout", ["dense, large", "planes"])
def test_tensors_without_alignment_are_read_in_small_pieces(layout):
    found = {one.name: one for one in compiled(layout, torch.bfloat16, offset=1)}
    assert found["moments_kernel"].widest_load == 2
    assert all(one.spilled <= FEW for one in found.values())


def test_conversions_and_divisions_in_float64_are_done_once_for_many_values():
    """Conversions to float64 and divisions in it: 16 values of a thread are in each tile.

    The second pass reads with evict_first, so that the cache keeps what is read again.
    """
    found = {one.name: one.ptx for one in compiled("channels-last", torch.bfloat16)}
    assert found["moments_kernel"].count("cvt.f64.f32") <= 16 + 8
    assert found["moments_kernel"].count("div.rn.f64") <= 1
    assert found["input_kernel"].count("div.rn.f64") <= 1
    for name in ("normalize_kernel", "input_kernel"):
        loop = re.search(r"(\$L__BB0_\d+):.*?bra\s+\1;", found[name], re.DOTALL)
        assert loop and "f64" not in loop[0], name
        assert "L2::evict_first" in found[name], name


def test_offsets_of_64_bits_compile_without_spills_and_with_whole_vectors(long_offsets):
    long_offsets()
    found = compiled("planes", torch.bfloat16) + compiled("channels-last", torch.bfloat16)
    assert all(one.spilled <= FEW for one in found)
    assert {one.widest_load for one in found if one.name == "normalize_kernel"} == {16}


@pytest.mark.parametrize("layout", SHAPES)
def test_sums_use_no_atomic_additions(layout):
    for one in compiled(layout, torch.bfloat16):
        assert " atom." not in one.ptx and " red." not in one.ptx, one.name


def test_no_product_or_sum_is_left_to_be_fused_by_ptxas():
    """A product without .rn may become part of an fma, in one kernel and not in another."""
    for layout, act in (("planes, small", "silu"), ("channels-last", "relu")):
        for one in compiled(layout, torch.bfloat16, act):
            assert not re.search(r"(mul|add|sub)\.f(32|64)", one.ptx), one.name
    assert "fma.rn.f32" in one.ptx


def tensor(shape, last=False, dtype=torch.bfloat16):
    if not last:
        return torch.empty(shape, dtype=dtype)
    return torch.empty(shape[0], *shape[2:], shape[1], dtype=dtype).movedim(-1, 1)


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
        ahead.step(tensor(shape, last))
    for one in found:
        assert prod(one.grid) < 2**31
        if one.name in ("moments_kernel", "sums_kernel") and prod(one.grid) <= 2 * 132:
            # Two of them on a multiprocessor of 227 KiB and 65536 registers.
            assert 2 * one.shared <= 227 * 1024, (one.name, one.shared)
            assert 2 * one.registers * one.warps * 32 <= 65536, (one.name, one.registers)


@pytest.mark.parametrize("samples", [1, 3, 8, 250])
@each(channels=[1, 8, 513, 8192], dtype=[torch.bfloat16, torch.float32])
def test_tiles_of_every_size_compile(channels, dtype, samples):
    """From a single value up; Triton fails at some that look no different from others."""
    with ahead.launches() as found:
        ahead.step(tensor((samples, channels), dtype=dtype))
        ahead.step(tensor((samples, min(channels, 8), 7, 7), dtype=dtype))
    assert found


def test_other_batch_sizes_and_momenta_compile_no_new_kernel():
    """Sizes and momentum are arguments of the kernels."""
    with ahead.launches() as first:
        ahead.step(tensor((256, 64, 56, 56), True))
    with ahead.launches() as later:
        ahead.step(tensor((512, 64, 56, 56), True), momentum=0.25)
    assert {one.hash for one in later} <= {one.hash for one in first}


def test_a_network_compiles_few_kernels():
    """All of ResNet-50's layers together, at a third of a second each on one core."""
    with ahead.launches() as found:
        for shape, both in cases.CUDA_SHAPES.items():
            if both and shape[0] == 256:
                for adds in (False, True):
                    ahead.step(tensor(shape, True), adds=adds)
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
def test_a_call_allocates_and_launches_and_does_nothing_else(shape):
    """So it can be captured in a graph: nothing is read back, copied or computed on the way."""
    x, called = tensor(shape), Called()
    with ahead.launches() as found, called:
        ahead.step(x)
    assert found
    assert called.names <= {"empty", "empty_like", "select", "slice", "alias", "detach"}
