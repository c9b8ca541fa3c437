"""Normalization by ``torch.batch_norm`` under ordinary autograd, as ``torch.nn`` computes it.

This serves eager calls for which no kernels of this library are selected by default: on CPUs
without the native module, on CUDA, and on other devices. Speed, saved tensors and higher
derivatives are those of ``torch.nn.BatchNorm2d`` followed by an in-place addition and activation.
There are two differences:
inputs with the channels on another axis than 1 are viewed as (outer, C, inner), and per-channel
tensors are cast to the compute dtype, the only dtype that torch accepts on all devices.

The accuracy of the statistics is torch's: on the CPU it sums contiguous input in float64, and
(N, C) and channels-last input in float32.
"""

import torch
from torch import Tensor

from batchnorm import layout
from batchnorm.layout import compute_dtype
from batchnorm.moments import Moments
from batchnorm.ops.call import Arguments, Epilogue, RunningBuffers

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Devices on which torch accepts 16-bit input with float32 parameters.
_MIXING = ("cpu", "cuda")


def takes(x: Tensor) -> bool:
    """Return whether torch's kernels accept x (in training, with several values per channel)."""
    if x.dtype not in DTYPES or x.layout is not torch.strided or not x.numel():
        return False
    return x.is_cpu or x.dtype is compute_dtype(x) or x.device.type in _MIXING


def forward(
    x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: RunningBuffers | None = None
) -> Tensor:
    """Normalize by batch statistics; update ``running`` by the mean and the unbiased variance.

    Running statistics must have the compute dtype. The caller increments the counter.

    As in ``torch.nn``, the update does not increment the tensors' versions: autograd saves them
    without reading them in backward, so an update before backward must not raise.
    """
    return _batch_norm(x, epilogue, eps, axis, True, running)


def evaluate(
    x: Tensor, mean: Tensor, var: Tensor, epilogue: Epilogue, eps: float, axis: int
) -> Tensor:
    """Normalize by stored statistics; autograd saves them, so pass copies if they may change."""
    dtype = compute_dtype(x)
    if mean.dtype is not dtype:
        mean = mean.to(dtype)
    if var.dtype is not dtype:
        var = var.to(dtype)
    return _batch_norm(x, epilogue, eps, axis, False, RunningBuffers(mean, var, None, 0.0))


def normalize_batch(call: Arguments) -> tuple[Tensor, Moments]:
    """Normalize by the input's own statistics; return y and the Moments."""
    x, axis = call.x, call.axis
    # With momentum 1 the kernel writes the batch's own statistics to mean and var.
    mean, var = torch.zeros(2, x.shape[axis], dtype=compute_dtype(x), device=x.device)
    y = forward(x, call.epilogue, call.eps, axis, RunningBuffers(mean, var, None, 1.0))
    count = x.numel() // x.shape[axis]
    return y, Moments.of_variance(count, mean, var, correction=1)


def normalize_by(call: Arguments, mean: Tensor, var: Tensor) -> Tensor:
    """Normalize by given statistics, which are constants and may be updated before backward."""
    if call.needs_grad:
        mean, var = mean.detach().clone(), var.detach().clone()
    return evaluate(call.x, mean, var, call.epilogue, call.eps, call.axis)


def _batch_norm(
    x: Tensor,
    epilogue: Epilogue,
    eps: float,
    axis: int,
    training: bool,
    stored: RunningBuffers | None,
) -> Tensor:
    weight, bias, residual, act = epilogue
    dtype = compute_dtype(x)
    if weight is not None and weight.dtype is not dtype:
        weight = weight.to(dtype)
    if bias is not None:
        if bias.dtype is not dtype:
            bias = bias.to(dtype)
        if weight is None:  # torch's double backward is wrong for a bias without a weight
            weight = torch.ones_like(bias, requires_grad=False)
    seen = x
    if not _is_taken_as_it_is(x, axis):
        seen = layout.canonical(x, axis)
        residual = None if residual is None else layout.canonical(x, axis, residual)
    mean, var, _, momentum = stored or (None, None, None, 0.0)
    cudnn = x.is_cuda and torch.backends.cudnn.enabled
    y = torch.batch_norm(seen, weight, bias, mean, var, training, momentum, eps, cudnn)
    if residual is not None:
        y.add_(residual)
    if act.name != "identity":
        y = act.over(y)
    return y if seen is x else layout.restored(y, x, axis)


def _is_taken_as_it_is(x: Tensor, axis: int) -> bool:
    """Return whether the channels are on axis 1, in a memory order that torch's kernels support."""
    if axis != 1:
        return False
    if x.is_contiguous():
        return True
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return order is not None and x.is_contiguous(memory_format=order)
