"""What of a layer is frozen: ``bn.freeze`` sets ``layer.frozen``."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


class Switches(NamedTuple):
    """What of a layer is frozen.

    Attributes:
        statistics: Running mean, variance, counter and further estimates stay as they are.
        affine: weight and bias get no gradient, whatever their ``requires_grad`` says.
        mode: A training step normalizes by the running statistics.
        folded: A training step is computed by the scaled weights of the convolution or linear
            layer before it, where there is one; needs ``statistics`` and ``mode``.
    """

    statistics: bool = True
    affine: bool = True
    mode: bool = True
    folded: bool = False

    def __str__(self) -> str:
        return ", ".join(self.on()) or "nothing"

    def on(self) -> Iterator[str]:
        """Yield the names of the switches that are on."""
        return (name for name, value in self._asdict().items() if value)


def without_gradient(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter, detached where it requires a gradient."""
    return parameter.detach() if parameter is not None and parameter.requires_grad else parameter
