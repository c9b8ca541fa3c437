"""Watching what enters the normalizations of a model."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from batchnorm import blocks
from batchnorm.errors import BatchNormError
from batchnorm.models import Found
from batchnorm.moments import Moments
from batchnorm.nn.base import Layer

Sink = Callable[[str, Moments], None]


@contextlib.contextmanager
def observed(layers: Iterable[Found], sink: Sink) -> Iterator[None]:
    """Call ``sink(layer name, Moments of its input)`` for every forward inside the block.

    The Moments are float64; a mask that a layer is given is respected. The hooks are removed at
    the end, also after an exception.
    """
    handles = []
    try:
        for found in layers:
            hook = _hook(found.name, sink)
            handles.append(found.layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def entering(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Moments:
    """Return the Moments of what enters a layer that is called with these arguments: float64."""
    x = args[0] if args else kwargs["input"]
    axis = getattr(layer, "axis", 1)
    mask = _mask(layer, args, kwargs)
    return blocks.moments(x, axis) if mask is None else Moments.of(x, axis, mask=mask)


def _hook(name: str, sink: Sink) -> Any:
    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            sink(name, entering(layer, args, kwargs))
        except BatchNormError as error:
            error.args = (f"{error} [entering layer {name!r}]",)
            raise

    return look


def _mask(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if not isinstance(layer, Layer):
        return None
    return args[2] if len(args) > 2 else kwargs.get("mask")
