"""The fast path while a graph is captured: ``F.batch_norm`` and ``num_batches_tracked.add_(1)``.

These are the nodes of ``torch.nn``'s own layers, so a captured or exported graph needs nothing of
this library, and ``graph.fuse`` finds both kinds of layer by the same pattern. Every attribute that
is read here becomes a guard of the compiled graph, evaluated at each call, so there are few. As in
``hot``, functions return None for a call that the general path in ``base`` must handle.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.compat.modes import is_transformed
from batchnorm.nn.attributes import Attributes


def forward(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return the result of the layer, or None if the general path must compute it."""
    rank = x.dim()
    if layer.axis != 1 or not (rank in layer.ranks if layer.ranks else rank > 1):
        return None
    if x.dtype is torch.float64 or not x.dtype.is_floating_point:
        return None
    if residual is not None and not (
        residual.shape == x.shape and residual.dtype is x.dtype and residual.device == x.device
    ):
        return None
    per_channel = layer.running_mean, layer.running_var, layer.weight, layer.bias
    for one in per_channel:
        if one is not None and not (
            one.shape == (x.size(1),) and one.dtype is torch.float32 and one.device == x.device
        ):
            return None
    if (per_channel[0] is None) is not (per_channel[1] is None):
        return None
    return (_train if layer.training else _evaluate)(layer, x, residual)


def _evaluate(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    mean, var = layer.running_mean, layer.running_var
    if mean is None or not layer.eps >= 0:
        return None
    y = F.batch_norm(x, mean, var, layer.weight, layer.bias, False, 0.0, layer.eps)
    return _rest(layer, y, residual)


def _rest(layer: Attributes, y: Tensor, residual: Tensor | None) -> Tensor:
    z: Tensor = y if residual is None else y + residual
    act = layer.activation
    return z if act.name == "identity" else act(z)


def _train(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    alpha, eps = layer.momentum, layer.eps
    plain = layer.statistics.plan == "batch" and layer.bank is None
    if not plain or alpha is None or not 0 < eps < torch.inf:
        return None
    if x.numel() <= x.size(1) or is_transformed():
        return None
    mean, var = layer.running_mean, layer.running_var
    tracks = layer.track_running_stats and mean is not None
    stored = (mean, var) if tracks else (None, None)
    y: Tensor = F.batch_norm(x, *stored, layer.weight, layer.bias, True, alpha, eps)  # type: ignore[call-arg]
    if tracks and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    return _rest(layer, y, residual)
