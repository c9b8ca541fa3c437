"""The one step in which a calibration changes a model."""

from collections.abc import Mapping

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.calibration.stage import Statistics


@torch.no_grad()
def write(layers: Mapping[str, _BatchNorm], new: Mapping[str, Statistics], batches: int) -> None:
    """Put new statistics in the layers' buffers; if that is interrupted, take it all back.

    Args:
        layers: Name -> layer.
        new: Name -> statistics, of some or all layers.
        batches: What their counters show afterwards.
    """
    values = []
    for name, statistics in new.items():
        layer = layers[name]
        for buffer, value in zip(("running_mean", "running_var"), statistics, strict=True):
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
