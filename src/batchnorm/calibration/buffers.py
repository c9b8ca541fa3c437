"""The statistics in the buffers of layers: read, and written in one step for all layers."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

BUFFERS = ("running_mean", "running_var")


class Statistics(NamedTuple):
    """Mean and variance for evaluation, (C,)."""

    mean: Tensor
    var: Tensor


def read(layer: _BatchNorm) -> Statistics:
    """Return copies of a layer's running statistics, in float64 on the CPU."""
    mean, var = (layer.get_buffer(name).double().cpu() for name in BUFFERS)
    return Statistics(mean.clone(), var.clone())


def usable(statistics: Statistics) -> Statistics:
    """Return statistics with 0 and 1 in the channels that are not finite or have a variance < 0."""
    mean, var = statistics
    good = mean.isfinite() & var.isfinite() & (var >= 0)
    return Statistics(torch.where(good, mean, 0.0), torch.where(good, var, 1.0))


@torch.no_grad()
def write(layers: Mapping[str, _BatchNorm], new: Mapping[str, Statistics], batches: int) -> None:
    """Write new statistics into the layers' buffers; if that is interrupted, restore all of them.

    Args:
        layers: Name -> layer.
        new: Name -> statistics, of some or all layers.
        batches: What ``num_batches_tracked`` becomes.
    """
    values = []
    for name, statistics in new.items():
        layer = layers[name]
        for buffer, value in zip(BUFFERS, statistics, strict=True):
            old = layer.get_buffer(buffer)
            values.append((old, value.to(old.device, old.dtype)))
        counter = layer.num_batches_tracked
        if counter is not None:
            values.append((counter, torch.full_like(counter, batches)))
    before = [old.clone() for old, _ in values]
    try:
        for old, value in values:
            old.copy_(value)
    except BaseException:
        for (old, _), copy in zip(values, before, strict=True):
            old.copy_(copy)
        raise
