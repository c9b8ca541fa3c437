"""Interception of calls of layers: ``entering`` observes inputs, ``replaced_forward`` replaces.

In a block, another function is assigned to the instance as ``module.forward``. Forward pre-hooks
would miss calls of ``layer.forward(x)``, and could not make a layer normalize by other statistics,
as calibration does.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from batchnorm import blocks, functional, layout
from batchnorm.errors import LayoutError, SurgeryError
from batchnorm.moments import Moments, centered
from batchnorm.nn.base import Layer
from batchnorm.selection import WHOLE, Selection
from batchnorm.sources.grouped import Grouped

# Layers of any class take any arguments.
Forward = Callable[..., object]  # type: ignore[explicit-any]

UNNAMED = """\
expected the layer's input as the first argument or as input=, got the keywords {names}: it is \
unknown which of them is normalized"""

SCRIPTED = """\
expected modules with a forward in Python, got the scripted {kind}, whose calls cannot be \
intercepted; use the original module"""


class Entered(NamedTuple):
    """The input of one call of a layer.

    Attributes:
        x: The input tensor, not a copy.
        axis: Its channel axis.
        selection: Which elements count, and how much: layers of this library take a mask, lengths
            or weights.
        grouped: The same, with the groups of samples of the call.
    """

    x: Tensor
    axis: int
    selection: Selection = WHOLE
    grouped: Selection = WHOLE

    def moments(self) -> Moments:
        """Return count, mean and m2 per channel of all samples, float64, (C,)."""
        return self._of(self.selection)

    def by_group(self) -> Moments:
        """Return count, mean and m2 per group, (groups, C), or of all samples, (C,)."""
        return self._of(self.grouped)

    def _of(self, selection: Selection) -> Moments:
        if selection.is_whole:
            return blocks.moments(self.x, self.axis)
        axis = layout.channel_axis(self.x.ndim, self.axis)
        return Moments(*centered(self.x.detach(), axis, selection))


def entered(layer: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Entered:
    """Return the input of a layer from the arguments of its call.

    Raises:
        LayoutError: If there is no positional argument and none named ``input``.
    """
    if not args and "input" not in kwargs:
        raise LayoutError(UNNAMED.format(names=list(kwargs)))
    x = cast("Tensor", args[0] if args else kwargs["input"])
    axis = getattr(layer, "axis", 1)
    names = ("mask", "lengths", "weights", "groups")
    chosen = dict(zip(names, (*args[2:6], None, None, None, None), strict=False))
    chosen |= {name: kwargs[name] for name in names if name in kwargs}
    if not isinstance(layer, Layer) or all(one is None for one in chosen.values()):
        return Entered(x, axis)
    mask, lengths, weights, ids = (cast("Tensor | None", chosen[name]) for name in names)
    count = layer.statistics.count if isinstance(layer.statistics, Grouped) else None
    count = None if ids is None else count
    axis_of_x = layout.channel_axis(x.ndim, axis)
    grouped = functional.selected(x, axis_of_x, mask, lengths, weights, ids, count)
    return Entered(x, axis, Selection(grouped.weights), grouped)


@contextlib.contextmanager
def entering(
    layers: Mapping[str, nn.Module], see: Callable[[str, Entered], None]
) -> Iterator[None]:
    """In a block, call ``see(name, input)`` before every call of some layers.

    An exception of ``see`` ends the forward pass.

    Args:
        layers: Name -> layer, of any class.
        see: Called with the name and the input. If it modifies the tensor, the layer gets the
            new values.
    """

    def around(
        name: str, layer: nn.Module, original: Forward, *args: object, **kwargs: object
    ) -> object:
        see(name, entered(layer, args, kwargs))
        return original(*args, **kwargs)

    pairs = (
        (layer, functools.partial(around, name, layer, layer.forward))
        for name, layer in layers.items()
    )
    with replaced_forward(pairs):
        yield


@contextlib.contextmanager
def replaced_forward(pairs: Iterable[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Replace the ``forward`` of modules in a block, and restore it afterwards.

    Blocks may be nested: a new function can call the ``module.forward`` that it replaces.

    Args:
        pairs: Modules, and the new ``forward`` of each.

    Raises:
        SurgeryError: If a module is a ``ScriptModule``.
    """
    with contextlib.ExitStack() as stack:
        for module, new in pairs:
            if isinstance(module, torch.jit.ScriptModule):
                raise SurgeryError(SCRIPTED.format(kind=module.original_name))
            if isinstance(new, functools.partial):
                # So that inspect.signature(module.forward) stays the same: calls depend on it.
                vars(new)["__wrapped__"] = module.forward
            stack.callback(_put_back, vars(module), vars(module).get("forward"))
            vars(module)["forward"] = new
        yield


def _put_back(attributes: dict[str, object], before: Forward | None) -> None:
    if before is None:
        attributes.pop("forward", None)
    else:
        attributes["forward"] = before
