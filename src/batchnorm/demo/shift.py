"""How the values entering an inner activation move while the layers before it learn.

Shapes: S recorded steps, U units. The same images are passed each time, so all movement comes from
the weights: this is the internal covariate shift, seen as in Figure 1 of Ioffe and Szegedy 2015.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from batchnorm.demo.networks import Activation
from batchnorm.models import inputs

PERCENTILES = (0.15, 0.5, 0.85)
# A unit is called saturated where its activation has less than a fifth of its greatest slope.
# For the sigmoid that is an output within 0.053 of 0 or 1.
SATURATED_SIGMOID = 2.887


@dataclass(frozen=True)
class Band:
    """15th, 50th and 85th percentile at each recorded step; S numbers each."""

    low: tuple[float, ...]
    middle: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Shift:
    """The values entering one layer's activation, over a training.

    Attributes:
        steps: Numbers of the S recorded steps.
        unit: Number of the unit whose median has a path of median length among all units.
        one_unit: Percentiles of that unit over the images.
        all_units: Percentiles over the images and all units together.
        saturated: Share of values at which the activation is flat, at each recorded step.
        drift: Standard deviation over time of a unit's mean, divided by the standard deviation of
            its values at one time (root mean squares over units).
    """

    steps: tuple[int, ...]
    unit: int
    one_unit: Band
    all_units: Band
    saturated: tuple[float, ...]
    drift: float


class ShiftProbe:
    """Records what enters one activation of a network, whenever it is asked to."""

    def __init__(
        self, network: nn.Module, layer: str, activation: Activation, images: Tensor
    ) -> None:
        self._network = network
        # A copy in training mode takes the passes, so that no statistic of the network moves.
        self._copy = copy.deepcopy(network).train()
        self._layer = layer
        self._activation = activation
        self._images = images
        self._steps: list[int] = []
        self._units: list[Tensor] = []
        self._all: list[Tensor] = []
        self._moments: list[tuple[Tensor, Tensor]] = []
        self._saturated: list[float] = []

    def record(self, step: int) -> None:
        """Pass the images, in training mode, through the weights as they are now."""
        with torch.no_grad():
            for mine, current in zip(
                self._copy.parameters(), self._network.parameters(), strict=True
            ):
                mine.copy_(current)
        values = entering(self._copy, self._layer, self._images)
        levels = torch.tensor(PERCENTILES, dtype=values.dtype)
        self._steps.append(step)
        self._units.append(values.quantile(levels, dim=0))
        self._all.append(values.flatten().quantile(levels))
        self._moments.append((values.mean(0), values.var(0)))
        self._saturated.append(_flat_share(values, self._activation))

    def result(self) -> Shift:
        """Everything recorded so far, as plain numbers."""
        units = torch.stack(self._units)
        unit = _unit_of_median_path(units[:, 1])
        return Shift(
            tuple(self._steps),
            unit,
            _band(units[:, :, unit]),
            _band(torch.stack(self._all)),
            tuple(self._saturated),
            _drift(*(torch.stack(part) for part in zip(*self._moments, strict=True))),
        )


@torch.no_grad()
def entering(network: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What enters ``layer`` when ``images`` pass: (N, U), float64."""
    seen: list[Tensor] = []
    watched = {layer: network.get_submodule(layer)}
    with inputs.entering(watched, lambda _, given: seen.append(given.x.double())):
        network(images)
    return seen[0]


def _flat_share(values: Tensor, activation: Activation) -> float:
    flat = values.abs() > SATURATED_SIGMOID if activation == "sigmoid" else values < 0
    return flat.double().mean().item()


def _unit_of_median_path(medians: Tensor) -> int:
    """Return the unit whose median, (S, U), has a path of median length."""
    paths = medians.diff(dim=0).abs().sum(0)
    return int(paths.argsort(stable=True)[len(paths) // 2])


def _band(percentiles: Tensor) -> Band:
    low, middle, high = (tuple(column.tolist()) for column in percentiles.unbind(1))
    return Band(low, middle, high)


def _drift(means: Tensor, variances: Tensor) -> float:
    over_time = means.var(0, correction=0).mean()
    at_one_time = variances.mean()
    return float((over_time / at_one_time).sqrt()) if at_one_time > 0 else 0.0
