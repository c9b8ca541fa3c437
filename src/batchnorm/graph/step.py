"""The function that a fused node of a captured graph calls."""

import torch
import torch.nn.functional as F
from torch import Tensor

from batchnorm.compat.modes import is_recomputing
from batchnorm.nn import hot
from batchnorm.ops.activations import Activation
from batchnorm.ops.call import Epilogue, RunningBuffers


def step(
    x: Tensor,
    running: RunningBuffers | None,
    training: bool,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    act: Activation,
) -> Tensor:
    """Return act(F.batch_norm(x, ...) + residual), and in training increment the counter.

    The last four arguments are an Epilogue. A node cannot have an Epilogue as an argument, because
    torch.fx generates code with an undefined class name for a NamedTuple (act) in a NamedTuple.
    Statistics and counter are not updated in the recomputation of activation checkpointing.
    """
    epilogue = Epilogue(weight, bias, residual, act)
    y = hot.call(x, epilogue, running, training, eps)
    if y is not None:
        return y
    if running is not None and training and is_recomputing():
        running = running._replace(mean=running.mean.clone(), var=running.var.clone(), counter=None)
    mean, var, counter, momentum = running or (None, None, None, 0.0)
    if counter is not None and training:
        counter.add_(1)
    y = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return act(y if residual is None else torch.add(y, residual))
