"""The function that a fused node of a captured graph calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.compat.modes import is_recomputing
from batchnorm.nn import hot
from batchnorm.ops.activations import Activation


def step(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    counter: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Return act(F.batch_norm(x, ...) + residual), and in training increment the counter.

    The arguments before ``counter`` are those of ``torch.nn.functional.batch_norm``. Statistics and
    counter are not updated in the recomputation of activation checkpointing.
    """
    given = (x, running_mean, running_var, weight, bias, training, momentum, eps)
    y = hot.call(*given, counter, residual, act)
    if y is not None:
        return y
    if is_recomputing() and training and running_mean is not None and running_var is not None:
        counter, running_mean, running_var = None, running_mean.clone(), running_var.clone()
    if counter is not None and training:
        counter.add_(1)
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return act(y if residual is None else torch.add(y, residual))
