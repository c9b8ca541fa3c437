"""Launches of the Triton kernels: workspace, grids and arguments.

Tensors are dense, in the memory order of ``shape`` (outer, C, inner), as ``cuda`` passes them.
Launches go to the current stream of the tensor's device and read nothing back, so they can be
captured in a CUDA graph.
"""

import contextlib
import ctypes

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.ops.activations import Activation
from batchnorm.ops.backends.triton import plan as triton_plan
from batchnorm.ops.backends.triton.backward import (
    backward_kernel,
    fold_kernel,
    input_kernel,
    sums_kernel,
)
from batchnorm.ops.backends.triton.forward import (
    finish_kernel,
    forward_kernel,
    moments_kernel,
    normalize_kernel,
)
from batchnorm.ops.backends.triton.plan import Tiling
from batchnorm.ops.call import RunningBuffers

Shape = tuple[int, int, int]

# Without this flag the compiler would contract products and sums to fma in some kernels but not in
# others. A result that another kernel recomputes must have the same bits, so tl.fma is explicit.
EXACT = {"enable_fp_fusion": False}

# Number of partial results reduced at a time, and of channels per reducing program.
FOLD_SPLITS, FOLD_CHANNELS = 256, 8


def forward(
    x: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    stats: Tensor,
    act: Activation,
    eps: float,
    running: RunningBuffers | None,
) -> None:
    """Fill y and stats (rows as in ``ForBackward``); update the running statistics."""
    plan = triton_plan.whole("forward", *shape, x.element_size())
    if plan is None:
        moments(x, shape, weight, bias, stats, eps, running)
        normalize(x, shape, stats[0], stats[2:4], weight, bias, residual, y, act, None)
        return
    with _on(x):
        forward_kernel[(plan.columns, 1)](
            x, weight, bias, residual, y, stats,
            *_step(running), *_sizes(plan), *_momentum(running),
            EPS=eps, **_activation(act), **_constants(plan, x),
            num_warps=plan.warps,
        )  # fmt: skip


def moments(
    x: Tensor,
    shape: Shape,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    eps: float,
    running: RunningBuffers | None,
) -> None:
    """Fill stats; update the running statistics."""
    plan = triton_plan.tiled("moments", *shape, x.element_size())
    partial = _workspace(x, 3, plan)
    with _on(x):
        moments_kernel[(plan.columns, plan.splits)](
            x, partial, *_sizes(plan), plan.share,
            **_constants(plan, x), STAGES=_stages("moments", x),
            num_warps=plan.warps, maxnreg=triton_plan.REGISTERS,
        )  # fmt: skip
        grid, sizes, constants = _fold(plan)
        finish_kernel[grid](
            partial, weight, bias, stats, *_step(running), *sizes, *_momentum(running),
            EPS=eps, **constants,
        )  # fmt: skip


def normalize(
    x: Tensor,
    shape: Shape,
    mean: Tensor,
    spread: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    y: Tensor,
    act: Activation,
    eps: float | None,
) -> None:
    """Fill y; ``spread`` is rstd if eps is None, else the variance.

    rstd is (C,), or (2, C) with its low part.
    """
    plan = triton_plan.tiled("apply", *shape, x.element_size())
    with _on(x):
        normalize_kernel[(plan.columns * plan.splits,)](
            x, mean, *_pair(spread), weight, bias, residual, y,
            *_sizes(plan), plan.columns, plan.share, _period(plan),
            EPS=eps, **_activation(act), **_constants(plan, x), STAGES=_stages("apply", x),
            num_warps=plan.warps,
        )  # fmt: skip


def backward(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    stats: Tensor,
    extra: Tensor | None,
    source: str,
    sums: Tensor,
    dx: Tensor,
    dresidual: Tensor | None,
    act: Activation,
) -> None:
    """Fill sums (2, C), dx, and dresidual if it is not None."""
    count = shape[0] * shape[2]
    plan = triton_plan.whole("backward", *shape, x.element_size())
    if plan is None:
        # If dz is exact in x's dtype, the first pass stores it as the residual's gradient and the
        # second pass reads it instead of dy and y. ReLU's dz is dy or 0; with other slopes a 16-bit
        # dz would be rounded.
        exact = act.name in ("relu", "relu6") or x.element_size() > 2
        early, late = (dresidual, None) if exact else (None, dresidual)
        sums_of(dy, x, shape, stats, extra, source, sums, early, act)
        if early is not None:
            dy, extra, source = early, None, "dz"
        input_of(dy, x, shape, stats, extra, source, sums[0], sums[1], dx, late, act, count)
        return
    with _on(x):
        backward_kernel[(plan.columns, 1)](
            dy, x, *_kept(stats), extra, sums, dx, dresidual,
            *_sizes(plan), *_two(count),
            SOURCE=source, **_activation(act), **_constants(plan, x), num_warps=plan.warps,
        )  # fmt: skip


def sums_of(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    stats: Tensor,
    extra: Tensor | None,
    source: str,
    sums: Tensor,
    dresidual: Tensor | None,
    act: Activation,
) -> None:
    """Fill sums (2, C) with sum(dz) and sum(dz * xhat), and dresidual, if not None, with dz."""
    plan = triton_plan.tiled("sums", *shape, x.element_size())
    partial = _workspace(x, 2, plan)
    with _on(x):
        sums_kernel[(plan.columns, plan.splits)](
            dy, x, *_kept(stats), extra, dresidual, partial,
            *_sizes(plan), plan.share, _period(plan),
            SOURCE=source, **_activation(act), **_constants(plan, x), STAGES=_stages("sums", x),
            num_warps=plan.warps,
        )  # fmt: skip
        grid, sizes, constants = _fold(plan)
        fold_kernel[grid](partial, sums, *sizes, **constants)


def input_of(
    dy: Tensor,
    x: Tensor,
    shape: Shape,
    stats: Tensor,
    extra: Tensor | None,
    source: str,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    dx: Tensor,
    dresidual: Tensor | None,
    act: Activation,
    count: float,
) -> None:
    """Fill dx, and dresidual, if it is not None, with dz."""
    plan = triton_plan.tiled("apply", *shape, x.element_size())
    with _on(x):
        input_kernel[(plan.columns * plan.splits,)](
            dy, x, *_kept(stats), extra, sum_dz, sum_dz_xhat, dx, dresidual,
            *_sizes(plan), plan.columns, plan.share, _period(plan), *_two(count or 1),
            SOURCE=source, **_activation(act), **_constants(plan, x), STAGES=_stages("apply", x),
            num_warps=plan.warps,
        )  # fmt: skip


def _on(x: Tensor) -> contextlib.AbstractContextManager[None]:
    """Make the tensor's device current: Triton launches on the current device's stream."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device)


def _workspace(x: Tensor, numbers: int, plan: Tiling) -> Tensor:
    return torch.empty(numbers, plan.splits, plan.channels, dtype=torch.float64, device=x.device)


def _sizes(plan: Tiling) -> tuple[int, int, int, int]:
    return plan.rows, plan.channels, plan.width, plan.parts


def _constants(plan: Tiling, x: Tensor) -> dict[str, object]:
    real = tl.float64 if x.dtype is torch.float64 else tl.float32
    return {
        "A": plan.a, "B": plan.b, "ALIGN": plan.align,
        "ROWS": plan.is_rows, "LONG": plan.long, "EVEN": plan.even, "REAL": real, **EXACT,
    }  # fmt: skip


def _stages(kind: str, x: Tensor) -> int:
    return triton_plan.STAGES[kind][x.element_size() > 2]


def _activation(act: Activation) -> dict[str, object]:
    return {"ACT": act.name, "SLOPE": act.slope}


def _period(plan: Tiling) -> int | None:
    """Return the channels of a sample if a row holds several samples, else None."""
    return None if plan.wraps == 1 else plan.channels // plan.wraps


def _fold(plan: Tiling) -> tuple[tuple[int], tuple[int, int], dict[str, int]]:
    """Return grid, parts and channels, and constants of a kernel that reduces partial results.

    Partial results of the samples of one row are consecutive, like those of several programs.
    """
    parts, channels = plan.splits * plan.wraps, plan.channels // plan.wraps
    block = min(FOLD_SPLITS, 1 << (parts - 1).bit_length())
    constants = {"S": block, "K": FOLD_CHANNELS, **EXACT}
    return (-(-channels // FOLD_CHANNELS),), (parts, channels), constants


def _step(running: RunningBuffers | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    return (None, None, None) if running is None else running[:3]


def _momentum(running: RunningBuffers | None) -> tuple[float, float]:
    return (0.0, 0.0) if running is None else _two(running[3])


def _pair(rstd: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return rstd and its low part, or None."""
    if rstd.dim() == 1:
        return rstd, None
    return rstd[0], rstd[1] if len(rstd) > 1 else None


def _kept(stats: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return mean, the two parts of rstd, weight and bias as forward used them."""
    return stats[0], stats[2], stats[3], stats[4], stats[5]


def _two(value: float) -> tuple[float, float]:
    """Split a number into its float32 value and the remainder: kernels take float32 scalars."""
    high = ctypes.c_float(value).value
    return high, float(value) - high
