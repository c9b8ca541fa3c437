"""What one batch brings: the Moments of all layers side by side, in memory that is used again.

Kernels write straight into it, so that a batch costs a few operations however many layers there
are. Legend: ``A`` all channels of all layers.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from batchnorm.errors import ChannelError
from batchnorm.moments import Moments, merge


class Row:
    """The Moments of one batch.

    Args:
        channels: Layer name -> number of channels, in order.

    Attributes:
        counts: Layer name -> values per channel, in the order in which the layers were called.
        values: mean and m2, float64 on the CPU, (2, A). Those of layers without a count are left
            over from an earlier batch that was taken.
        parts: Layer name -> its mean and m2, views of ``values``.
    """

    def __init__(self, channels: Mapping[str, int]) -> None:
        self.counts: dict[str, float] = {}
        self.values = torch.zeros(2, sum(channels.values()), dtype=torch.float64)
        cut = self.values.split(list(channels.values()), dim=1)
        self.parts = {name: (part[0], part[1]) for name, part in zip(channels, cut, strict=True)}
        # Of layers on other devices: fetched when all have run, as fetching waits for them.
        self._far: dict[str, Moments] = {}

    def put(self, name: str, found: Moments) -> None:
        """Take the Moments of one call of a layer.

        Raises:
            ChannelError: If they have another number of channels than the layer.
        """
        mean, m2 = self.parts[name]
        if found.mean.shape != mean.shape:
            raise ChannelError(
                f"expected an input with {len(mean)} channels, got one with {len(found.mean)}"
            )
        if name in self.counts:
            before = self._far.get(name, Moments(self.counts[name], mean, m2))
            found = merge(before, found)
        self.counts[name] = float(found.count)
        if found.mean.is_cpu:
            mean.copy_(found.mean)
            m2.copy_(found.m2)
        else:
            self._far[name] = found

    def fetch(self) -> None:
        """Fetch what is on other devices."""
        for name, found in self._far.items():
            for here, there in zip(self.parts[name], found[1:], strict=True):
                here.copy_(there)
        self._far.clear()

    def is_finite(self) -> bool:
        """Return whether no layer met a NaN or an infinity."""
        # One number tells: with one of these anywhere the sum of all is not finite. Huge float64
        # numbers have such a sum as well.
        return math.isfinite(self.values.sum().item()) or bool(self.values.isfinite().all())

    def where(self) -> str | None:
        """Return the first layer that met a NaN or an infinity."""
        for name in self.counts:
            if not all(part.isfinite().all() for part in self.parts[name]):
                return name
        return None

    def clear(self) -> None:
        """Forget everything."""
        self.counts = {}
        self._far.clear()
        self.values.zero_()

    def copies(self) -> dict[str, list[float | Tensor]]:
        """Return copies of what was found: layer name -> count, mean, m2."""
        self.fetch()
        parts = self.parts
        return {
            name: [n, *(part.clone() for part in parts[name])] for name, n in self.counts.items()
        }
