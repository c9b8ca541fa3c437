"""The running statistics and parameters per group of a layer with ``statistics=bn.Grouped``.

The buffers are ``group_mean`` and ``group_var``, (count, C), at least float32, and
``group_batches``, (count,), the number of batches with samples of each group. A state dict without
these buffers can be loaded: every group then starts from ``running_mean`` and ``running_var``.
"""

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.compat.modules import buffers
from batchnorm.errors import OptionError
from batchnorm.estimators.running import Running, move, share_of_next
from batchnorm.moments import Moments
from batchnorm.nn.common import Attributes
from batchnorm.sources.grouped import Grouped

NAMES = ("group_mean", "group_var", "group_batches")

LATE = """\
statistics={source} needs buffers that this layer does not have; pass it to the constructor: \
bn.{kind}(..., statistics={source})"""

POOLED = """\
statistics={source} updates the running statistics of each group at every batch; expected an \
estimator with every=1, got {estimator}"""


def arrange(layer: Attributes, source: Grouped) -> None:
    """Register the buffers per group in a new layer, and with affine="separate" the parameters.

    Raises:
        OptionError: If the layer is lazy, so that its number of channels is not known yet.
    """
    if layer.num_features == 0:
        raise OptionError(f"statistics={source} needs num_features; use a layer that is not lazy")
    batches = layer.num_batches_tracked
    if layer.running_mean is not None and batches is not None:
        for name in ("mean", "var"):
            whole = getattr(layer, f"running_{name}")
            layer.register_buffer(f"group_{name}", whole.repeat(source.count, 1))
        layer.register_buffer("group_batches", batches.repeat(source.count))
    if source.affine == "separate":
        for name in ("weight", "bias"):
            parameter = getattr(layer, name)
            if parameter is not None:
                setattr(layer, name, Parameter(parameter.detach().repeat(source.count, 1)))


def restart(layer: Attributes) -> None:
    """Set mean to 0, variance to 1 and the number of batches to 0, for every group."""
    table = buffers(layer)
    for name, value in zip(NAMES, (0, 1, 0), strict=True):
        if (buffer := table.get(name)) is not None:
            buffer.fill_(value)


def stored(layer: Attributes) -> tuple[Tensor | None, Tensor | None]:
    """Return the running mean and variance of each group, (count, C), or None.

    Raises:
        OptionError: If ``layer.statistics`` was set after construction, so there are no buffers.
    """
    if layer.running_mean is None:
        return None, None
    table = buffers(layer)
    if "group_mean" not in table:
        raise OptionError(LATE.format(source=layer.statistics, kind=type(layer).__name__))
    return table["group_mean"], table["group_var"]


def step(layer: Attributes, batch: Moments) -> None:
    """Update the running statistics of each group that has values in the batch, in place."""
    mean, var = stored(layer)
    batches = buffers(layer).get("group_batches")
    if mean is None or var is None or batches is None:
        return
    counted = torch.as_tensor(batch.count).reshape(-1) > 0
    alpha: float | Tensor | None = layer.momentum
    correction = 1
    first = None if layer.bank is None else next(iter(layer.bank.estimators.values()))
    if alpha is None:
        alpha = share_of_next(batches)[:, None]
    elif isinstance(first, Running):
        if first.every != 1:
            raise OptionError(POOLED.format(source=layer.statistics, estimator=first))
        alpha, correction = first.weight_after(batches[:, None]), first.correction
    move(mean, var, batch, alpha, correction)
    batches.add_(counted.long())


def complete(layer: Attributes, state: MutableMapping[str, Tensor], prefix: str) -> None:
    """Add missing entries per group to a state dict, from the entries of all samples."""
    source = getattr(layer, "statistics", None)  # not set yet while torch's __init__ runs
    if not isinstance(source, Grouped):
        return
    whole = ("running_mean", "running_var", "num_batches_tracked")
    for name, of_all in zip(NAMES, whole, strict=True):
        buffer = buffers(layer).get(name)
        value = state.get(prefix + of_all)
        if buffer is not None and value is not None and prefix + name not in state:
            state[prefix + name] = value.expand_as(buffer)
    if source.affine == "separate":
        for name in ("weight", "bias"):
            parameter, value = getattr(layer, name), state.get(prefix + name)
            if parameter is not None and value is not None and value.ndim == 1:
                state[prefix + name] = value.expand(source.count, -1)
