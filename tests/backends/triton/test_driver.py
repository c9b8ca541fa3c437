"""The CUDA driver library of the tests against the driver of the installed Triton."""

import ctypes
import re

import pytest

pytest.importorskip("triton")

from support import ahead

if ahead.missing():
    pytest.skip(ahead.missing(), allow_module_level=True)

HEADER = (ahead.NVIDIA / "include" / "cuda.h").read_text()


def looked_up():
    """Functions of libcuda.so.1 that Triton calls or looks up with dlsym, as the linker names them."""
    sources = "\n".join(path.read_text() for path in sorted(ahead.NVIDIA.glob("driver.*")))
    named = set(re.findall(r"\bcu[A-Z]\w*", re.sub(r"//.*", "", sources)))
    declared = set(re.findall(r"CUresult CUDAAPI (cu\w+)\(", HEADER))
    versioned = dict(re.findall(r"#define (cu\w+)\s+(cu\w+)", HEADER))
    return sorted(versioned.get(name, name) for name in named & declared)


def test_every_driver_function_that_triton_looks_up_is_in_the_fake_libcuda():
    names = looked_up()
    assert {"cuDeviceGet", "cuLaunchKernelEx", "cuTensorMapEncodeTiled"} <= set(names)
    assert [name for name in names if not hasattr(ahead.libcuda(), name)] == []


def test_the_fake_driver_has_the_version_of_the_cuda_header_that_triton_brings():
    version = ctypes.c_int()
    assert ahead.libcuda().cuDriverGetVersion(ctypes.byref(version)) == 0
    assert version.value == int(re.search(r"#define CUDA_VERSION (\d+)", HEADER)[1])


def test_triton_loads_its_driver_from_the_fake_libcuda():
    found = ahead.Driver(90).utils.get_device_properties(0)
    assert found["multiprocessor_count"] == 132
    assert found["warpSize"] == 32
