"""The kernels compiled for a GPU that is not there: what the interpreter forgives, ptxas does not."""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiling needs TRITON_INTERPRET unset", allow_module_level=True)

from support import ahead, oracle

if ahead.missing():
    pytest.skip(ahead.missing(), allow_module_level=True)

from batchnorm.ops.activations import NAMES, Activation
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.backends.triton import plan as triton_plan
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from support.combinations import each

SHAPES = {
    "dense": ((64, 96), False),
    "dense, large": ((8192, 1024), False),
    "channels-last": ((8, 64, 56, 56), True),
    "channels-last, odd": ((8, 24, 28, 28), True),
    "planes": ((32, 64, 56, 56), False),
    "planes, small": ((8, 64, 7, 7), False),
    "planes, odd": ((4, 8, 99, 99), False),
}
HOPPER, AMPERE = 90, 80
# Bytes of a thread's stack: ptxas spends 8 here and there to end at 64 or 128 registers.
FEW = 16


def compiled(
    layout, dtype, act="relu", adds=True, capability=HOPPER, parameters=torch.float32, offset=0
):
    """What a training step and an evaluation launch, by name of the kernel."""
    shape, last = SHAPES[layout]
    x = torch.empty(torch.Size(shape).numel() + offset, dtype=dtype)[offset:].view(shape)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    channels = shape[1]
    weight, bias = (torch.empty(channels, dtype=parameters) for _ in range(2))
    residual = torch.empty_like(x) if adds else None
    act = Activation(act, 0.5)
    stored = torch.empty(channels), torch.empty(channels), torch.empty((), dtype=torch.int64)
    running = RunningBuffers(*stored, 0.1)
    with ahead.launches(capability) as found:
        y, stats = cuda.forward(x, Epilogue(weight, bias, residual, act), 1e-5, 1, running)
        cuda.evaluate(x, running[0], running[1], Epilogue(weight, bias, residual, act), 1e-5, 1)
        saved = ForBackward(x, stats, oracle.beside(act, residual, y), act, 1)
        cuda.backward(y, saved, adds)
        sums = cuda.backward_sums(y, saved)
        cuda.backward_input(y, saved, *sums, 64, adds)
    return found


# Each layout with two of the dtypes: a kernel takes the third of a second to be compiled.
@each(layout=[*SHAPES] * 2, dtype=[torch.bfloat16, torch.float32, torch.float16])
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


def test_kernels_compile_for_an_older_gpu():
    for layout in ("channels-last", "planes"):
        assert all(one.spilled <= FEW for one in compiled(layout, torch.float16, capability=AMPERE))


@pytest.mark.parametrize("layout", ["dense, large", "channels-last", "planes"])
def test_tiles_are_read_16_bytes_at_a_time_and_copied_ahead(layout):
    found = {one.name: one for one in compiled(layout, torch.bfloat16)}
    for name in ("normalize_kernel", "moments_kernel", "sums_kernel", "input_kernel"):
        assert found[name].widest_load == 16, name
    assert found["moments_kernel"].pipelined
    assert found["sums_kernel"].pipelined


@pytest.mark.parametrize("layout", ["dense, large", "planes"])
def test_tensors_without_alignment_are_read_in_small_pieces(layout):
    found = {one.name: one for one in compiled(layout, torch.bfloat16, offset=1)}
    assert found["moments_kernel"].widest_load == 2
    assert all(one.spilled <= FEW for one in found.values())


def test_conversions_and_divisions_in_float64_are_done_once_for_many_values():
    """Conversions to float64 and divisions in it: 16 values of a thread are in each tile."""
    found = {one.name: one.ptx for one in compiled("channels-last", torch.bfloat16)}
    assert found["moments_kernel"].count("cvt.f64.f32") <= 16 + 8
    assert found["moments_kernel"].count("div.rn.f64") <= 1
    assert found["input_kernel"].count("div.rn.f64") <= 1
    for name in ("normalize_kernel", "input_kernel"):
        loop = re.search(r"(\$L__BB0_\d+):.*?bra\s+\1;", found[name], re.DOTALL)
        assert loop and "f64" not in loop[0], name


def test_the_second_pass_gives_up_what_it_has_read():
    found = {one.name: one.ptx for one in compiled("channels-last", torch.bfloat16)}
    for name in ("normalize_kernel", "input_kernel"):
        assert "L2::evict_first" in found[name], name


def test_any_number_of_channels_is_read_in_whole_vectors(monkeypatch):
    monkeypatch.setitem(SHAPES, "33 channels", ((32, 33, 28, 28), True))
    for layout in ("channels-last, odd", "33 channels"):
        found = {one.name: one for one in compiled(layout, torch.bfloat16)}
        for name in ("normalize_kernel", "moments_kernel", "sums_kernel", "input_kernel"):
            assert found[name].widest_load == 16, (layout, name)


def test_more_elements_than_32_bits_address(monkeypatch):
    real = triton_plan._plan
    monkeypatch.setattr(triton_plan, "_plan", lambda *a: real(*a)._replace(long=True))
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()
    found = compiled("planes", torch.bfloat16) + compiled("channels-last", torch.bfloat16)
    triton_plan.tiled.cache_clear(), triton_plan.whole.cache_clear()
    assert all(one.spilled <= FEW for one in found)
    assert {one.widest_load for one in found if one.name == "normalize_kernel"} == {16}


def test_nothing_is_added_by_atomics():
    for layout in SHAPES:
        for one in compiled(layout, torch.bfloat16):
            assert " atom." not in one.ptx and " red." not in one.ptx, one.name


def test_the_compiler_is_free_to_fuse_nothing():
    """A product without .rn may become part of an fma, in one kernel and not in another."""
    for layout, act in (("planes, small", "silu"), ("channels-last", "relu")):
        for one in compiled(layout, torch.bfloat16, act):
            assert not re.search(r"(mul|add|sub)\.f(32|64)", one.ptx), one.name
    assert "fma.rn.f32" in one.ptx
