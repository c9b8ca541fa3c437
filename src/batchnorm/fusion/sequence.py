"""A sequence of modules, in which a normalization and the activation behind it are one call.

Between two neighbours of a sequence nobody gets hold of a tensor. So nothing has to be put off, and
small layers gain as well: one module less is called, and one operation less is recorded. And
convolutions may pass on their images in the order of memory that suits them.
"""

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import _get_current_function_mode

from batchnorm.fusion import channels_last, stretch, watchers
from batchnorm.fusion.plan import Plan
from batchnorm.fusion.watch import CALLS, Watch
from batchnorm.nn import hot
from batchnorm.nn.base import Layer
from batchnorm.ops.activations import IDENTITY, of_module

# With one of these of its own, a subclass of torch's does more than call its parts in turn, or is
# made in a way of its own.
_OWN = (
    "forward", "__call__", "__iter__", "__getattribute__", "__slots__",
    "__new__", "__init_subclass__", "__reduce__", "__reduce_ex__", "__getstate__",
)  # fmt: skip

_NOTHING = (None, IDENTITY)


class Sequential(nn.Sequential):
    """What a ``torch.nn.Sequential`` is in a converted model; it has its name and its parts."""

    _adopted_from = nn.Sequential

    def forward(self, input: Any) -> Any:
        """Return what calling one module after the other returns, but for the order of rounding."""
        if is_compiling() or watchers.are_everywhere() or _is_seen():
            return super().forward(input)
        found = None
        if channels_last.may_help(input):
            found = stretch.find(self, input, _is_walked)
        return self._walk(input, found)

    def _walk(self, x: Any, found: stretch.Stretch | None) -> Any:
        together = not (watchers.count_what_is_saved() or torch._C._len_torch_function_stack())
        done: Any = None
        modules: list[Any] = [*self._modules.values(), None]
        for module, after in pairwise(modules):
            if module is done:
                done = None
            elif found is not None and module in found.nested:
                x = Sequential._walk(module, x, found)
            elif found is not None and module in found.convs:
                x = found.convolve(module, x)
            else:
                y = _together(module, after, x) if together and after is not None else None
                x, done = (module(x), None) if y is None else (y, after)
        return x

    def __reduce_ex__(self, protocol: Any) -> Any:
        if "_adopted_from" not in vars(type(self)):
            return super().__reduce_ex__(protocol)
        # A class that was made here is not found by its name.
        reduced: Any = super().__reduce_ex__(2)
        return (_new, (self._adopted_from,), *reduced[2:])


CALLS.add(Sequential._walk.__code__)


def adopt(model: nn.Module) -> None:
    """Let the sequences of a converted model compute together what they hold side by side."""
    for module in reversed([*model.modules()]):  # the inner before the outer
        cls: Any = type(module)
        if _is_plain(cls) and _holds_learning(module):
            module.__class__ = _adopted(cls)


def is_enough(model: nn.Module) -> bool:
    """Return whether every layer stands before an activation in a sequence, in a converted model.

    Then nothing has to be learned of a forward pass, and nothing put off.
    """
    if "_fusion" in model.__dict__:
        return False
    return all(
        isinstance(parent, Sequential)
        and _is_learning(module)
        and after is not None
        and of_module(after) not in _NOTHING
        for parent in model.modules()
        for module, after in pairwise([*parent._modules.values(), None])
        if module is not None and "_fusion" in module.__dict__
    )


def release(model: nn.Module) -> None:
    """Undo ``adopt``."""
    for module in model.modules():
        if origin := vars(type(module)).get("_adopted_from"):
            module.__class__ = origin
            module.__dict__.pop(stretch.PLACE, None)


def _is_plain(cls: type) -> bool:
    """Return whether modules of a class do nothing but call their parts, and are none of ours."""
    if not issubclass(cls, nn.Sequential) or issubclass(cls, Sequential) or type(cls) is not type:
        return False
    own = (vars(one) for one in cls.__mro__ if one not in nn.Sequential.__mro__)
    return not any(name in names for names in own for name in _OWN)


@functools.cache
def _adopted(cls: Any) -> Any:
    if cls is nn.Sequential:
        return Sequential
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "_adopted_from": cls}
    return type(cls.__name__, (Sequential, cls), names)


def _new(cls: Any) -> Any:
    adopted = _adopted(cls)
    return adopted.__new__(adopted)


def _is_seen() -> bool:
    """Return whether a mode sees the calls of all functions, other than our own that watches."""
    modes: int = torch._C._len_torch_function_stack()
    return modes > 1 or (modes == 1 and type(_get_current_function_mode()) is not Watch)


def _is_walked(module: nn.Module) -> bool:
    return isinstance(module, Sequential) or type(module) is nn.Sequential


def _together(layer: Any, after: nn.Module, x: Tensor) -> Tensor | None:
    """Return the activated result of a layer, or None where the two are to be called in turn."""
    if not _is_learning(layer):
        return None
    act, plans, key = of_module(after), layer._fusion.plans, layer.training
    if act in _NOTHING or _is_touched(layer) or _is_touched(after):
        return None
    plan = plans.get(key)
    if plan is not None and (type(plan) is not Plan or plan.act != act):
        return None
    y = hot.forward(layer, x, None, act)
    if plan is None and y is not None:
        plans[key] = Plan(act=act, crossed=(after,))
    return y


def _holds_learning(sequence: nn.Module) -> bool:
    return any(
        _is_learning(part) or (_is_walked(part) and _holds_learning(part))
        for part in sequence._modules.values()
        if part is not None
    )


def _is_learning(module: Any) -> bool:
    # A class with a forward of its own does more than the layer.
    return "_fusion" in module.__dict__ and type(module).forward is Layer.forward


def _is_touched(module: nn.Module) -> bool:
    return watchers.are_at(module) or "forward" in module.__dict__
