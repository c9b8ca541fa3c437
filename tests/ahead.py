"""Compiling what a call would launch, for a GPU that is not there.

``launches`` catches every launch of a Triton kernel and compiles it with the very arguments,
specialized as Triton's own launcher does it: multiples of 16 are marked, 1 becomes a constant.
"""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Compiled(NamedTuple):
    """One kernel as ptxas left it."""

    name: str
    ptx: str
    registers: int
    spilled: int
    shared: int
    warps: int

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
        """Whether tiles are copied to shared memory while others are worked on."""
        return "cp.async" in self.ptx


def source(kernel, args, kwargs):
    """The kernel with a signature that tells what its arguments are like."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        whole = isinstance(value, int) and not isinstance(value, bool)
        plain = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (whole and value == 1 and plain):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        elif whole:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and plain:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    return ASTSource(kernel, signature, constants, attributes)


def usage(cubin):
    """Registers of a thread, and bytes that did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return int(re.search(r"REG:(\d+)", said)[1]), int(re.search(r"STACK:(\d+)", said)[1])


@contextlib.contextmanager
def launches(capability=90):
    """Compile instead of launching, inside the block; the list fills with ``Compiled``."""
    target, found = GPUTarget("cuda", capability, 32), []
    genuine = JITFunction.run

    def run(kernel, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in kwargs}
        done = triton.compile(source(kernel, args, kwargs), target=target, options=options)
        registers, spilled = usage(done.asm["cubin"])
        shared = done.metadata.shared
        name = kernel.__name__
        found.append(
            Compiled(name, done.asm["ptx"], registers, spilled, shared, done.metadata.num_warps)
        )

    JITFunction.run = run
    try:
        yield found
    finally:
        JITFunction.run = genuine
