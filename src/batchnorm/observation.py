"""What enters a normalization, as Moments."""

from typing import Any

from torch import Tensor, nn

from batchnorm import blocks
from batchnorm.moments import Moments
from batchnorm.nn.base import Layer


def entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
    """Return the Moments of what enters a layer that is called with these arguments: float64."""
    x = args[0] if args else kwargs["input"]
    axis = getattr(layer, "axis", 1)
    mask = _mask(layer, args, kwargs)
    return blocks.moments(x, axis) if mask is None else Moments.of(x, axis, mask=mask)


def _mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if not isinstance(layer, Layer):
        return None
    return args[2] if len(args) > 2 else kwargs.get("mask")
