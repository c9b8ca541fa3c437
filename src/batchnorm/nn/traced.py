"""The fast path while a graph is captured: ``F.batch_norm`` and ``num_batches_tracked.add_(1)``.

``torch.nn``'s layers emit the same nodes, so a captured or exported graph does not depend on this
library, and ``graph.fuse`` finds both kinds of layer by one pattern. Every attribute that is read
here becomes a guard of the compiled graph, which each call evaluates, so few are read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.traceback import annotate

from batchnorm.compat.modes import is_transformed
from batchnorm.nn.common import Attributes, affine_of, moves, plan_of

# Key in the metadata "custom" of a graph's nodes.
NOTE = "batchnorm"


def forward(layer: Attributes, x: Tensor, residual: Tensor | None) -> Tensor | None:
    """Return the result of the layer, or None if the general path must compute it."""
    rank, plan = x.dim(), plan_of(layer)
    if plan is None or layer.axis != 1:
        return None
    if not (rank in layer.ranks if layer.ranks else rank > 1):
        return None
    if x.dtype is torch.float64 or not x.dtype.is_floating_point:
        return None
    if residual is not None and not (
        residual.shape == x.shape and residual.dtype is x.dtype and residual.device == x.device
    ):
        return None
    mean, var = layer.running_mean, layer.running_var
    weight, bias = affine_of(layer, layer.weight, layer.bias)
    for tensor in (mean, var, weight, bias):
        if tensor is not None and not (
            tensor.shape == (x.size(1),)
            and tensor.dtype is torch.float32
            and tensor.device == x.device
        ):
            return None
    if (mean is None) is not (var is None):
        return None
    if plan == "batch":
        if x.numel() <= x.size(1) or is_transformed():
            return None
        if not moves(layer):
            mean = var = None
    elif mean is None:
        return None
    training = plan == "batch"
    arguments = x, mean, var, weight, bias, training, layer.momentum or 0.0, layer.eps
    y: Tensor
    if layer.training and layer.frozen is not None and layer.frozen.folded:
        # The backend "batchnorm" folds nodes with this annotation; torch and Inductor ignore it.
        with annotate({NOTE: "folded"}):
            y = F.batch_norm(*arguments)
    else:
        y = F.batch_norm(*arguments)
    if training and moves(layer) and layer.num_batches_tracked is not None:
        layer.num_batches_tracked.add_(1)
    if residual is not None:
        y = y + residual
    return y if layer.activation.name == "identity" else layer.activation(y)
