"""Records the arguments and results of every module call of a model, in order.

It is used on copies of models, which are not restored: ``forward`` of every module is replaced, and
hooks are added last, so that changes by other hooks are recorded.
"""

import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from batchnorm.comparison.gaps import Leaf, leaves
from batchnorm.comparison.matching import is_layer, modules
from batchnorm.compat.modes import is_transformed
from batchnorm.compat.tensors import version
from batchnorm.models.inputs import Forward
from batchnorm.models.walk import kind_of

Key = tuple[str, int]
At = Literal["in", "out", "gradient"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Event:
    """The arguments of a module call, its result, or the gradient of the result.

    Attributes:
        key: Name of the module, and the number of its earlier calls.
        at: Arguments, result or gradient.
        within: Name of the calling module; None for the model itself.
        is_leaf: Whether the module has no children or is a batch norm.
        leaves: Path and value of each item; tensors are not copied.
        sources: The calls that returned these tensors, if they have not been modified since.
    """

    key: Key
    at: At
    within: str | None
    is_leaf: bool
    leaves: tuple[Leaf, ...]
    sources: tuple[Key, ...] = ()


class Recorder:
    """Calls ``see(event)`` before and after each module call of a model.

    Attributes:
        see: May be replaced for every run.
        open: Names of the running modules; after an exception, the modules it passed through.
        gradients: Whether to record gradients of outputs as well, in backward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.see: Callable[[Event], None] = lambda event: None  # noqa: ARG005
        self.open: list[str] = []
        self.gradients = False
        self._made = _Makers()
        self._counts: dict[str, int] = {}
        self._pending: list[nn.Module] = []
        for name, module in modules(model).items():
            if isinstance(module, torch.jit.ScriptModule):
                continue
            vars(module)["forward"] = functools.partial(self._run, name, module, module.forward)
            module.register_forward_pre_hook(self._announce)
            module.register_forward_hook(functools.partial(self._hooked, name))

    def start(self, see: Callable[[Event], None]) -> None:
        """Begin a run."""
        self.see = see
        self.open, self._pending = [], []
        self._made = _Makers()
        self._counts = {}
        self._results: dict[str, list[_Open | None]] = {}

    def _announce(self, module: nn.Module, args: Any) -> None:  # noqa: ARG002
        self._pending.append(module)

    def _run(
        self, name: str, module: nn.Module, original: Forward, /, *args: Any, **kwargs: Any
    ) -> Any:
        if is_transformed():  # inside of vmap and the like tensors have no values
            if self._pending and self._pending[-1] is module:
                self._pending.pop()
            self._results.setdefault(name, []).append(None)
            return original(*args, **kwargs)
        by_call = bool(self._pending) and self._pending[-1] is module
        if by_call:
            self._pending.pop()
        nth = self._counts.get(name, 0)
        self._counts[name] = nth + 1
        is_leaf = is_layer(module) or kind_of(module) is not None
        call = _Open((name, nth), self.open[-1] if self.open else None, is_leaf)
        given = tuple(leaves((args, dict(kwargs))))
        sources = self._made.of(given)
        self.see(Event(call.key, "in", call.within, is_leaf, given, sources))
        self.open.append(name)
        result = original(*args, **kwargs)
        self.open.pop()
        if by_call:
            self._results.setdefault(name, []).append(call)
        else:
            self._returned(call, result)
        return result

    def _hooked(self, name: str, module: nn.Module, args: Any, result: Any) -> None:  # noqa: ARG002
        call = self._results[name].pop()
        if call is not None:
            self._returned(call, result)

    def _returned(self, call: "_Open", result: Any) -> None:
        found = tuple(leaves(result))
        sources = self._made.of(found)
        self.see(Event(call.key, "out", call.within, call.is_leaf, found, sources))
        new = self._made.add(found, call.key)
        if self.gradients:
            for path, tensor in new:
                if tensor.requires_grad:
                    tensor.register_hook(functools.partial(self._slope, call, path))

    def _slope(self, call: "_Open", path: str, gradient: Tensor) -> None:
        self.see(Event(call.key, "gradient", call.within, call.is_leaf, ((path, gradient),)))


@dataclass
class _Open:
    """A running call."""

    key: Key
    within: str | None
    is_leaf: bool


class Unwritten(Generic[Found]):
    """Values attached to tensors, valid while the tensor exists and is not modified."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], int, Found]] = {}

    def put(self, tensor: Tensor, value: Found) -> None:
        """Set the value for the current version of a tensor."""
        self._known[id(tensor)] = weakref.ref(tensor), version(tensor), value

    def get(self, tensor: Tensor) -> Found | None:
        """Return the value of a tensor, or None if it has none or was modified."""
        known = self._known.get(id(tensor))
        if known is None or known[0]() is not tensor or known[1] != version(tensor):
            return None
        return known[2]


class _Makers(Unwritten[Key]):
    """Tensor -> the call that returned it."""

    def add(self, found: tuple[Leaf, ...], key: Key) -> list[tuple[str, Tensor]]:
        """Store the call that returned tensors; return the tensors that had none."""
        new = [(p, t) for p, t in found if isinstance(t, Tensor) and self.get(t) is None]
        for _, tensor in new:
            self.put(tensor, key)
        return new

    def of(self, found: tuple[Leaf, ...]) -> tuple[Key, ...]:
        """Return the calls that returned the tensors, if known."""
        makers = (self.get(t) for _, t in found if isinstance(t, Tensor))
        return tuple(dict.fromkeys(key for key in makers if key is not None))
