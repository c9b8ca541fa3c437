"""The backend "aten": the kernels of torch that ``F.batch_norm`` runs.

It serves calls that need a backend (``bn.save_memory``, ``bn.Synced``) on CUDA and on devices for
which this library has no kernels, and ``use_backend("aten")``. Other calls on those devices are
computed by ``torch_norm``. Mean and variance come from ``batch_norm_update_stats``:
``native_batch_norm`` returns 1 / sqrt(var + eps) in float32, from which a variance much smaller
than eps cannot be recovered. The addition and the activation are separate operations.

Torch's CUDA kernel sums in float32, by Welford's recurrence in each thread: the mean may be off by
a few roundings, and the variance by more than 1e-6 where |mean| / std is 1000 or more
(docs/decisions/0013-triton.md). Its CPU kernel sums contiguous input in float64, and (N, C)
and channels-last input in float32.

``backward_sums`` and ``backward_input`` are those of ``reference``.
"""

import torch
from torch import Tensor

from batchnorm.errors import UnservedError
from batchnorm.layout import compute_dtype
from batchnorm.ops.activations import IDENTITY
from batchnorm.ops.backends import reference, torch_norm
from batchnorm.ops.call import Epilogue, ForBackward, RunningBuffers

commits = True
reads_output = True
selection = None

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def serves(x: Tensor, epilogue: Epilogue, axis: int, mode: str) -> str | None:
    """Return the reason why a call cannot be served, or None if it can."""
    weight, bias, residual, _ = epilogue
    if axis != 1:
        return f"the channels are on axis {axis}; torch's kernels take them on axis 1"
    if x.dtype not in _DTYPES or x.layout is not torch.strided:
        return f"it is {x.layout} of {x.dtype}; torch's kernels take strided floating tensors"
    if not (x.is_cpu or x.is_cuda):
        return f"it is on {x.device}; these operations of torch exist for CPUs and CUDA"
    if not x.numel() or (mode == "train" and x.numel() <= x.shape[1]):
        return "torch's kernels take more than one value per channel in training, and one in eval"
    dtype = compute_dtype(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype != dtype or tensor.device != x.device):
            return f"{name} is {tensor.dtype} on {tensor.device}; expected {dtype} on {x.device}"
    if residual is not None and (residual.dtype != x.dtype or residual.device != x.device):
        return f"the residual is {residual.dtype} on {residual.device}; expected the input's dtype"
    return None


def moments(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Return mean and m2 per channel, in float64."""
    mean, var = _statistics(x, None)
    return mean.double(), var.double() * (x.numel() // x.shape[1])


def normalize(x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int) -> Tensor:
    """Return act((x - mean) * rstd * weight + bias + residual)."""
    weight, bias, residual, act = epilogue
    rstd = rstd if rstd.ndim == 1 else rstd[0]
    if x.is_cuda:
        y = torch.batch_norm_elemt(x, weight, bias, mean, rstd, 0.0)
    else:  # the CPU has no batch_norm_elemt; evaluation is the same formula
        y = torch.native_batch_norm(x, weight, bias, mean, rstd**-2, False, 0.0, 0.0)[0]
    return act.over(y if residual is None else y.add_(residual))


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
) -> Tensor:
    """Normalize by stored statistics."""
    return torch_norm.evaluate(x, mean, var, epilogue, eps, axis)


def forward(
    x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: RunningBuffers | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize by the input's own statistics; return y and stats (6, C), the low part of rstd 0.

    With ``running``, torch's kernel updates the running statistics, which must have the compute
    dtype, and the counter is increased.

    Raises:
        UnservedError: If the running statistics have another dtype; nothing has been changed.
    """
    if running is not None and running.mean.dtype != compute_dtype(x):
        raise UnservedError(
            f"expected running statistics of {compute_dtype(x)}, got {running.mean.dtype}; torch's "
            "kernel updates them in the compute dtype"
        )
    mean, var = _statistics(x, running)
    rstd = torch.rsqrt(var + eps)
    zero = torch.zeros_like(mean)
    weight, bias = epilogue.weight, epilogue.bias
    affine = [torch.ones_like(mean) if weight is None else weight, zero if bias is None else bias]
    stats = torch.stack([mean, var, rstd, zero, *affine])
    return normalize(x, mean, rstd, epilogue, axis), stats


backward_sums = reference.backward_sums
backward_input = reference.backward_input


def backward(
    dy: Tensor, saved: ForBackward, want_residual: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``forward``: dx, dresidual, sum(dz), sum(dz * xhat)."""
    x, stats, beside, act, axis = saved
    mean, rstd, weight, bias = stats[0], stats[2], stats[4], stats[5]
    dz = dy
    if act.name != "identity":
        z = beside
        if z is None or not act.from_output:
            z = normalize(x, mean, rstd, Epilogue(weight, bias, beside, IDENTITY), axis)
        dz = act.backward(dy, z)
    dx, sum_dz_xhat, sum_dz = torch.ops.aten.native_batch_norm_backward(
        dz, x, weight, None, None, mean, rstd, True, 0.0, [True, True, True]
    )
    return dx, dz if want_residual else None, sum_dz, sum_dz_xhat


def _statistics(x: Tensor, running: RunningBuffers | None) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance in the compute dtype; update ``running`` if given."""
    if running is None:
        # The CPU kernel returns results in the dtype of the running statistics.
        scratch = (
            [None, None] if x.is_cuda else [*x.new_zeros(2, x.shape[1], dtype=compute_dtype(x))]
        )
        return torch.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
    stored = (running.mean, running.var)
    mean, var = torch.batch_norm_update_stats(x, *stored, running.momentum)
    if running.counter is not None:
        running.counter.add_(1)
    return mean, var
