"""Who serves a CUDA call: the Triton kernels, or torch's own where they were measured to be faster.

``choices.csv`` holds rows as the benchmark writes them (``benchmark.rows``), of the contenders
"triton" and "aten". A row speaks for its device, mode, operation, dtype and memory layout, and for
all sizes within a factor of 4 of its own, in channels and in values per channel. Torch's kernels
serve where every row that speaks has them faster by ``MARGIN``; where none speaks, the Triton
kernels do. ``benchmarks/cuda_session.py --parts choices`` writes the table.

Inputs of more than 16 bits always go to the Triton kernels: with torch's, statistics lose digits
that are promised (see ``aten``), and a result of 16 bits is where that cannot be seen.
"""

import csv
import functools
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from batchnorm.ops import aten, cuda
from batchnorm.ops.activations import Activation

TABLE = Path(__file__).with_name("choices.csv")

# Torch's kernels must win by more than noise.
MARGIN = 1.03

# Rows of bf16 speak for fp16, which is as many bytes and the same code.
DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16"}

# mode, operation, dtype, layout, size of channels, size of values per channel
Class = tuple[str, str, str, str, int, int]

commits = True

# Whether backward reads the mask off y where it may: either of the two may be the one to read it.
reads_output = False
serves = cuda.serves
moments = cuda.moments
backward_sums = cuda.backward_sums
backward_input = cuda.backward_input


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
    running: Any = None,
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (6, C)."""
    server = served("train", x, weight, bias, act, residual is not None, axis)
    y, stats = server.forward(x, weight, bias, residual, act, eps, axis, running)
    return y, stats


def normalize(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    axis: int,
) -> Tensor:
    """Normalize by whom ``forward`` would choose: ``save_memory`` makes its bits again by this."""
    server = served("train", x, weight, bias, act, residual is not None, axis)
    y: Tensor = server.normalize(x, mean, rstd, weight, bias, residual, act, axis)
    return y


def evaluate(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
    eps: float,
    axis: int,
) -> Tensor:
    """Normalize by stored statistics."""
    server = served("eval", x, weight, bias, act, residual is not None, axis)
    y: Tensor = server.evaluate(x, mean, var, weight, bias, residual, act, eps, axis)
    return y


def backward(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    beside: Tensor | None,
    act: Activation,
    axis: int,
    want_residual: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Invert ``forward``; stats are read alike by both."""
    adds = want_residual or beside is not None
    server = served("train", x, stats[4], stats[5], act, adds, axis)
    given = (dy, x, stats, beside, act, axis, want_residual)
    dx, dresidual, sum_dz, sum_dz_xhat = server.backward(*given)
    return dx, dresidual, sum_dz, sum_dz_xhat


def served(
    mode: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    act: Activation,
    adds: bool,
    axis: int,
) -> ModuleType:
    """Return the module that serves a call in ``mode`` ("train" or "eval")."""
    if x.dtype not in DTYPES:
        return cuda
    table = faster(device_name(x.device))
    if not table or not table.get(_class(mode, x.dtype, x.shape, x.stride(), act.name, adds)):
        return cuda
    return aten if aten.serves(x, weight, bias, None, axis) is None else cuda


@functools.cache
def faster(device: str) -> dict[Class, bool]:
    """Return which classes of inputs were measured on a device, and whether torch's win there."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for row in read():
        if row["machine"] == device and row["contender"] in ("triton", "aten"):
            cell = (row["mode"], row["op"], row["dtype"], row["layout"], row["shape"])
            times.setdefault(cell, {})[row["contender"]] = float(row["median"])
    found: dict[Class, bool] = {}
    for (mode, op, dtype, layout, shape), taken in times.items():
        if len(taken) == 2:
            key = (mode, op, dtype, layout, *_sizes([int(size) for size in shape.split("x")]))
            found[key] = found.get(key, True) and taken["aten"] * MARGIN < taken["triton"]
    return found


def read() -> list[dict[str, str]]:
    """Return the measured rows."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def said() -> str:
    """Return in words what the choice on a CUDA device rests on."""
    machines = sorted({row["machine"] for row in read()})
    if not machines:
        return "nothing was measured: the Triton kernels serve every CUDA call"
    return f"rows measured on {', '.join(machines)}; elsewhere the Triton kernels serve"


@functools.cache
def device_name(device: torch.device) -> str:
    """Return what rows call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.lru_cache(maxsize=4096)
def _class(
    mode: str,
    dtype: torch.dtype,
    shape: torch.Size,
    stride: tuple[int, ...],
    act: str,
    adds: bool,
) -> Class:
    op = "+".join(["bn", *(["add"] if adds else []), *([act] if act != "identity" else [])])
    layout = "N,C" if len(shape) == 2 else "channels-last" if stride[1] == 1 else "contiguous"
    return (mode, op, DTYPES[dtype], layout, *_sizes(shape))


def _sizes(shape: Any) -> tuple[int, int]:
    """Return the size, in powers of 4, of the channels and of the values of one."""
    channels = shape[1]
    values = prod(shape) // channels if channels else 0
    return channels.bit_length() // 2, values.bit_length() // 2
