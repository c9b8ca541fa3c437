"""The backend "triton": the Triton kernels as functions of plain tensors.

Statistics are new tensors in the compute dtype; ``reference`` defines the results. Contiguous
inputs, and dense inputs with the channels innermost (channels-last, or (N, C)), are read without a
copy; any other input is first copied to a contiguous tensor.

Triton is imported at the first call, since the import is slow. If ``TRITON_INTERPRET=1`` is set at
that time, the kernels run in Triton's interpreter on the CPU, for tests, and only under
``use_backend("triton")``.
"""

import functools
import importlib
import importlib.util
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from batchnorm.layout import compute_dtype, dense, like, like_or_none, vector, walked
from batchnorm.ops.activations import Activation
from batchnorm.ops.backends import reference
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers

commits = True
reads_output = False
selection = None

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Rows of stats: mean, var, high and low part of rstd, weight, bias.
_STATS = 6


def missing() -> str | None:
    """Return the reason why this backend is not available, or None if it is."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; it comes with the CUDA builds of torch"
    if not interprets() and torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is built without CUDA; "
            "TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
        )
    if not interprets() and sys.platform == "linux" and not _compiles():
        return (
            "Triton compiles its kernel launcher with gcc or clang (or CC) and Python.h: the "
            "compiler or the header is missing"
        )
    return None


def _compiles() -> bool:
    """Return whether Triton will find a C compiler and Python's headers, at the first launch."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and Path(sysconfig.get_path("include"), "Python.h").exists()


def interprets() -> bool:
    """Return whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")


def serves(x: Tensor, epilogue: Epilogue, axis: int, mode: str) -> str | None:
    """Return the reason why a call cannot be served, or None if it can."""
    device = x.device
    if x.layout is not torch.strided or not (x.is_cuda or (x.is_cpu and interprets())):
        return f"it is {x.layout} on {device}; the Triton kernels take strided CUDA tensors"
    dtype = x.dtype
    if dtype not in _DTYPES:
        return f"its dtype is {dtype}; the Triton kernels take float32, bfloat16, float16, float64"
    for name, tensor in (("weight", epilogue.weight), ("bias", epilogue.bias)):
        if tensor is not None and (tensor.device != device or tensor.dtype not in _DTYPES):
            return f"{name} is {tensor.dtype} on {tensor.device}; expected floating on {device}"
    residual = epilogue.residual
    if residual is not None and (residual.dtype != dtype or residual.device != device):
        return f"the residual is {residual.dtype} on {residual.device}; expected the input's dtype"
    return None


def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, in float64."""
    x, *shape = dense(x, axis)
    stats = torch.zeros(_STATS, shape[1], dtype=torch.float64, device=x.device)
    if x.numel():
        _kernels().moments(x, tuple(shape), None, None, stats, 1.0, None)
    return stats[0], stats[1] * (x.numel() // shape[1] if shape[1] else 0)


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual), in one pass."""
    return _normalize(x, mean, rstd, epilogue, None, axis)


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
) -> Tensor:
    """Normalize by stored statistics; rstd is computed in the same pass."""
    return _normalize(x, mean, var, epilogue, eps, axis)


def forward(
    x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: RunningBuffers | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (6, C).

    With ``running`` the call updates the running statistics and increments their versions.
    """
    weight, bias, residual, act = epilogue
    x, *shape = dense(x, axis)
    y = torch.empty_like(x)
    if not x.numel():
        zero = torch.zeros(shape[1], dtype=compute_dtype(x), device=x.device)
        rstd = torch.full_like(zero, eps**-0.5, dtype=torch.float64)
        return y, reference.known_stats(x, zero, zero, rstd, weight, bias)
    stats = torch.empty(_STATS, shape[1], dtype=compute_dtype(x), device=x.device)
    given = vector(weight), vector(bias), like_or_none(residual, x)
    _kernels().forward(x, tuple(shape), *given, y, stats, act, eps, running)
    if running is not None:
        moved = (running.mean, running.var)
        increment_version(moved if running.counter is None else (*moved, running.counter))
    return y, stats


def backward_sums(dy: Tensor, saved: ForBackward) -> tuple[Tensor, Tensor]:
    """Return sum(dz) and sum(dz * xhat) per channel."""
    x, stats, beside, act, axis = saved
    x, *shape = dense(x, axis)
    if not x.numel():
        sums = torch.zeros(2, shape[1], dtype=compute_dtype(x), device=x.device)
    else:
        sums = torch.empty(2, shape[1], dtype=compute_dtype(x), device=x.device)
        source, extra = _source(act, beside, x)
        given = walked(stats), extra, source, sums, None, act
        _kernels().sums_of(like(dy, x), x, tuple(shape), *given)
    return sums[0], sums[1]


def backward_input(
    dy: Tensor,
    saved: ForBackward,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float | Tensor,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return dx from the merged sums and count, and dresidual = dz if wanted."""
    x, stats, beside, act, axis = saved
    x, *shape = dense(x, axis)
    dy = like(dy, x)
    dx, dresidual = torch.empty_like(x), _dresidual(dy, x, act, want_residual)
    if x.numel():
        source, extra = _source(act, beside, x)
        sums = walked(sum_dz), walked(sum_dz_xhat)
        stored = None if dresidual is dy else dresidual
        given = walked(stats), extra, source, *sums, dx, stored, act, count
        _kernels().input_of(dy, x, tuple(shape), *given)
    return dx, dresidual


def backward(
    dy: Tensor, saved: ForBackward, want_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    x, stats, beside, act, axis = saved
    x, *shape = dense(x, axis)
    dy, stats = like(dy, x), walked(stats)
    dx, dresidual = torch.empty_like(x), _dresidual(dy, x, act, want_residual)
    if not x.numel():
        sums = torch.zeros(2, shape[1], dtype=compute_dtype(x), device=x.device)
        return dx, dresidual, sums[0], sums[1]
    sums = torch.empty(2, shape[1], dtype=compute_dtype(x), device=x.device)
    source, extra = _source(act, beside, x)
    stored = None if dresidual is dy else dresidual
    _kernels().backward(dy, x, tuple(shape), stats, extra, source, sums, dx, stored, act)
    return dx, dresidual, sums[0], sums[1]


@functools.cache
def _kernels() -> ModuleType:
    """Import Triton, and the kernels with it, at the first call."""
    return importlib.import_module("batchnorm.ops.backends.triton.launch")


def _normalize(
    x: Tensor,
    mean: Tensor,
    spread: Tensor,
    epilogue: Epilogue,
    eps: float | None,
    axis: int,
) -> Tensor:
    weight, bias, residual, act = epilogue
    x, *shape = dense(x, axis)
    y = torch.empty_like(x)
    if x.numel():
        given = vector(weight), vector(bias), like_or_none(residual, x)
        _kernels().normalize(x, tuple(shape), walked(mean), walked(spread), *given, y, act, eps)
    return y


def _source(act: Activation, beside: Tensor | None, x: Tensor) -> tuple[str, Tensor | None]:
    """Return the kernels' ``SOURCE`` for act'(z), and the tensor that it reads besides x."""
    if act.name == "identity":
        return "none", None
    if beside is None:
        return "x", None
    return "y" if act.from_output else "residual", like(beside, x)


def _dresidual(dy: Tensor, x: Tensor, act: Activation, wanted: bool) -> Tensor | None:
    """Return the tensor for dz, if wanted; without an activation dz is dy."""
    if not wanted:
        return None
    return dy if act.name == "identity" else torch.empty_like(x)
