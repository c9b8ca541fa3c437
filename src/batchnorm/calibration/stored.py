"""Reading and writing the running statistics of layers, of all samples and of each group.

A layer has one *place* for the statistics of all samples, and with ``statistics=bn.Grouped`` one
more for each group. The name of a place is the layer's, and ``"layer[2]"`` for group 2.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.compat.modules import buffers
from batchnorm.errors import CalibrationError
from batchnorm.nn.base import Layer
from batchnorm.nn.groups import NAMES
from batchnorm.sources.grouped import Grouped

BUFFERS = ("running_mean", "running_var")
GROUP_BUFFERS = NAMES[:2]

TWICE = """\
the model has a layer {name!r}, which is also the name of a group of samples of the layer \
{layer!r}; rename the layer, or leave one of the two out by layers="""


class Statistics(NamedTuple):
    """Mean and variance for evaluation, (C,)."""

    mean: Tensor
    var: Tensor


class Place(NamedTuple):
    """The buffers of a layer for all samples, or their rows for one group of samples.

    Attributes:
        name: Name of the layer.
        layer: The layer.
        group: Number of the group; None for all samples.
    """

    name: str
    layer: _BatchNorm
    group: int | None = None

    @property
    def buffers(self) -> tuple[Tensor, Tensor]:
        """Mean and variance, (C,), as views of the layer's buffers."""
        names = BUFFERS if self.group is None else GROUP_BUFFERS
        mean, var = map(self.layer.get_buffer, names)
        return (mean, var) if self.group is None else (mean[self.group], var[self.group])

    @property
    def batches(self) -> Tensor | None:
        """The counter of batches, (); None for a layer without one."""
        if self.group is None:
            return self.layer.num_batches_tracked
        return self.layer.get_buffer(NAMES[2])[self.group]


def places(layers: Mapping[str, _BatchNorm]) -> dict[str, Place]:
    """Return the places of layers that store statistics, by their names, in order.

    Raises:
        CalibrationError: If a layer has the name of another layer's group.
    """
    found: dict[str, Place] = {}
    for name, layer in layers.items():
        found[name] = Place(name, layer)
        for group in range(groups_of(layer)):
            key = key_of(name, group)
            if key in layers:
                raise CalibrationError(TWICE.format(name=key, layer=name))
            found[key] = Place(name, layer, group)
    return found


def groups_of(layer: _BatchNorm) -> int:
    """Return the number of groups of samples for which a layer stores statistics."""
    rows = buffers(layer).get(NAMES[0])
    grouped = isinstance(layer, Layer) and isinstance(layer.statistics, Grouped)
    return len(rows) if grouped and rows is not None else 0


def key_of(name: str, group: int) -> str:
    """Return the name of the place of a group."""
    return f"{name}[{group}]"


def read(place: Place) -> Statistics:
    """Return copies of stored statistics, in float64 on the CPU."""
    mean, var = (buffer.double().cpu() for buffer in place.buffers)
    return Statistics(mean.clone(), var.clone())


def usable(statistics: Statistics) -> Statistics:
    """Return statistics with mean 0 and variance 1 where they are not finite or var < 0."""
    mean, var = statistics
    good = mean.isfinite() & var.isfinite() & (var >= 0)
    return Statistics(torch.where(good, mean, 0.0), torch.where(good, var, 1.0))


@torch.no_grad()
def write(
    where: Mapping[str, Place], new: Mapping[str, Statistics], batches: Mapping[str, int] | None
) -> None:
    """Write new statistics into the layers' buffers; if interrupted, restore all of them.

    Args:
        where: Name -> place.
        new: Name -> statistics, for some or all places.
        batches: Name -> new value of the counter; None to leave counters unchanged.
    """
    values = []
    for name, statistics in new.items():
        place = where[name]
        values += list(zip(place.buffers, statistics, strict=True))
        if batches is not None and place.batches is not None:
            values.append((place.batches, torch.full_like(place.batches, batches[name])))
    before = [old.clone() for old, _ in values]
    try:
        for old, value in values:
            old.copy_(value)
    except BaseException:
        for (old, _), copy in zip(values, before, strict=True):
            old.copy_(copy)
        raise
