"""Compiles and launches Triton kernels without a GPU.

Triton itself does every step of a launch: it binds and specializes the arguments, compiles the kernel
for the GPU, compiles the launcher with the C compiler, and calls the launcher. The launcher calls
``fake_cuda.c`` instead of libcuda; the fake refuses what libcuda would refuse. Works with Triton 3.6
(torch 2.11) and 3.7 (torch 2.12 and 2.13).
"""

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from batchnorm.ops.activations import Activation
from batchnorm.ops.backends.triton import cuda
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers
from support import oracle

NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia"
COMPILER = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
FOLDER = tempfile.TemporaryDirectory(prefix="fake-cuda-")

# first fields of a CUlaunchConfig: grid and block in x, y, z, and bytes of shared memory
Config = ctypes.c_uint * 7
Watcher = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.POINTER(Config), ctypes.POINTER(ctypes.c_void_p)
)


class Launch(NamedTuple):
    """A kernel launch, and the kernel's resources as ptxas compiled it."""

    name: str
    grid: tuple[int, int, int]
    shared: int
    warps: int
    registers: int
    spilled: int
    ptx: str
    hash: str

    @property
    def widest_load(self):
        """Bytes of the widest load from global memory by one thread."""
        plain = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", self.ptx)
        copied = re.findall(r"cp\.async\.c[ag]\.shared\.global \[.*?\], \[.*?\], (\w+)", self.ptx)
        return max(
            *(int(many or 1) * int(bits) // 8 for many, bits in plain),
            *(int(size, 0) for size in copied),
            0,
        )

    @property
    def pipelined(self):
        """Whether tiles are copied to shared memory asynchronously, during work on other tiles."""
        return "cp.async" in self.ptx


def missing():
    """Return why these launches cannot run on this machine, or None if they can."""
    if torch.cuda.is_available():
        return "there is a GPU, and its libcuda"
    return None if cuda._compiles() else "Triton needs a C compiler and Python.h"


@functools.cache
def usage(cubin):
    """Return registers per thread, and bytes per thread that were spilled to the stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [NVIDIA / "bin" / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return int(re.search(r"REG:(\d+)", said)[1]), int(re.search(r"STACK:(\d+)", said)[1])


@functools.cache
def libcuda():
    """Compile the fake library, and load it under the name that launchers ask for."""
    path = Path(FOLDER.name, "libcuda.so.1")
    source = Path(__file__).with_name("fake_cuda.c")
    flags = ["-shared", "-fPIC", "-I", NVIDIA / "include", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([COMPILER, *flags, source, "-o", path], check=True)
    triton.knobs.nvidia.libcuda_path = FOLDER.name
    return ctypes.CDLL(path, ctypes.RTLD_GLOBAL)


class Driver(CudaDriver):
    """Triton's driver for a fake current device, whose number is its capability: 90 is Hopper."""

    def __init__(self, capability):
        libcuda()
        super().__init__()
        self.get_current_device = lambda: capability
        self.get_device_capability = lambda device: divmod(device, 10)
        self.get_current_stream = lambda device: 0


@contextlib.contextmanager
def launches(capability=90):
    """Make launches in the block go to the fake library; yields a list that collects them."""
    found, genuine = [], JITFunction.run

    def run(kernel, *args, **kwargs):
        seen = []
        watcher = Watcher(lambda function, config, params: seen.append(tuple(config[0])))
        libcuda().watch(watcher)
        done = genuine(kernel, *args, **kwargs)
        libcuda().watch(None)
        ((*sizes, shared),) = seen
        name, warps = kernel.__name__, done.metadata.num_warps
        assert sizes[3:] == [32 * warps, 1, 1]
        ptxas = usage(done.asm["cubin"])
        found.append(
            Launch(name, tuple(sizes[:3]), shared, warps, *ptxas, done.asm["ptx"], done.hash)
        )
        return done

    driver.set_active(Driver(capability))
    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = genuine
        driver.set_active(None)


def step(x, act="relu", adds=True, momentum=0.1, parameters=torch.float32):
    """Call the backend as a layer does in a training step and in evaluation, and as save_memory does.

    Only addresses of tensors are used and nothing is written, so large tensors need no memory.
    """
    weight, bias = (torch.empty(x.shape[1], dtype=parameters) for _ in range(2))
    mean, var = (torch.empty(x.shape[1]) for _ in range(2))
    running = RunningBuffers(mean, var, torch.empty((), dtype=torch.int64), momentum)
    epilogue = Epilogue(weight, bias, x if adds else None, Activation(act, 0.5))
    y, stats = cuda.forward(x, epilogue, 1e-5, 1, running)
    cuda.evaluate(x, mean, var, epilogue, 1e-5, 1)
    beside = oracle.beside(epilogue.act, epilogue.residual, y)
    saved = ForBackward(x, stats, beside, epilogue.act, 1)
    cuda.backward(y, saved, adds)
    sums = cuda.backward_sums(y, saved)
    cuda.backward_input(y, saved, *sums, x.numel() / x.shape[1], adds)
