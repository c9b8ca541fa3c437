"""The common case with as few questions as possible.

Small layers are common, and for them the questions cost more than the arithmetic. What is decided
here is only whether a call is the common one: a plain tensor of the right shape, nobody looking
on, torch's own rule for the statistics. Then a backend does it in one call, the step of the
running statistics included. Everything else, and every error, takes the general way in ``base``.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.nn.tracking import WIDE
from batchnorm.ops import eager
from batchnorm.ops.activations import Activation
from batchnorm.ops.backend import select
from batchnorm.ops.onlookers import is_calm, is_recomputing
from batchnorm.sources.batch import Batch


def forward(
    layer: Any,
    x: Tensor,
    residual: Tensor | None,
    act: Activation | None = None,
    found: list[Tensor] | None = None,
) -> Tensor | None:
    """Return the result of the layer, or None where the call is not the common one.

    Args:
        layer: The layer.
        x: Its input.
        residual: What is added to it.
        act: An activation in the place of the layer's own.
        found: In training receives stats (4, C), see ``ops.reference``.
    """
    if type(x) is not Tensor or not is_calm():
        return None
    parameters, buffers = layer._parameters, layer._buffers
    try:
        weight, bias = parameters["weight"], parameters["bias"]
        mean, var = buffers["running_mean"], buffers["running_var"]
    except KeyError:  # one that is parametrized is an attribute like any other
        return None
    axis, rank = layer.axis, x.dim()
    if not (rank in layer.ranks if layer.ranks else rank > 1 and -rank <= axis < rank):
        return None
    if axis < 0:
        axis += rank
    if (mean is None) is not (var is None) or not x.dtype.is_floating_point:
        return None
    channels = x.shape[axis]
    if not (_parameters(channels, weight, bias) and _statistics(channels, x, mean, var)):
        return None
    wants_grad = x.requires_grad
    if weight is not None:
        wants_grad = wants_grad or weight.requires_grad
    if bias is not None:
        wants_grad = wants_grad or bias.requires_grad
    if residual is not None:
        if type(residual) is not Tensor or not _alike(residual, x):
            return None
        wants_grad = wants_grad or residual.requires_grad
    wants_grad = wants_grad and torch.is_grad_enabled()
    act = layer.activation if act is None else act
    if layer.training:
        found = [] if found is None else found
        return _train(layer, x, axis, weight, bias, residual, wants_grad, act, found)
    if mean is None or var is None or wants_grad or not layer.eps >= 0:
        return None
    backend = select(x, weight, bias, residual, axis)
    if not backend.commits:  # the reference asks nothing of its tensors
        return None
    y: Tensor = backend.evaluate(x, mean, var, weight, bias, residual, act, layer.eps, axis)
    return y


def _parameters(channels: int, *tensors: Tensor | None) -> bool:
    for tensor in tensors:
        if tensor is not None and (tensor.numel() != channels or tensor.dim() != 1):
            return False
        if tensor is not None and type(tensor) is not Parameter and type(tensor) is not Tensor:
            return False
    return True


def _statistics(channels: int, x: Tensor, mean: Tensor | None, var: Tensor | None) -> bool:
    """Return whether a kernel can read, and write, the statistics in place."""
    if mean is None or var is None:
        return True
    return (
        mean.shape == var.shape == (channels,)
        and mean.dtype in WIDE
        and mean.dtype == var.dtype
        and mean.device == var.device == x.device
        and mean.is_contiguous()
        and var.is_contiguous()
    )


def _alike(residual: Tensor, x: Tensor) -> bool:
    return residual.dtype == x.dtype and residual.shape == x.shape


def _train(
    layer: Any,
    x: Tensor,
    axis: int,
    weight: Parameter | None,
    bias: Parameter | None,
    residual: Tensor | None,
    wants_grad: bool,
    act: Activation,
    found: list[Tensor],
) -> Tensor | None:
    buffers = layer._buffers
    mean, var = buffers["running_mean"], buffers["running_var"]
    momentum, eps = layer.momentum, layer.eps
    plain = type(layer.statistics) is Batch and layer._bank is None and momentum is not None
    if not plain or not 0 < eps < torch.inf or x.numel() <= x.shape[axis]:
        return None
    backend = select(x, weight, bias, residual, axis)
    running = None
    if layer.track_running_stats and mean is not None and not is_recomputing():
        counter = buffers["num_batches_tracked"]
        if not backend.commits or mean.is_inference() or counter is None:
            return None
        if counter.dtype is not torch.int64 or counter.device != x.device:
            return None
        running = (mean, var, counter, momentum)
    if wants_grad:
        step = eager.Step(act, eps, axis, backend, found, running)
        y: Tensor = eager.apply_batch(x, weight, bias, residual, step)
    else:
        y, stats = backend.forward(x, weight, bias, residual, act, eps, axis, running)
        found.append(stats)
    if running is not None:
        torch._C._increment_version(running[:3])
    return y
