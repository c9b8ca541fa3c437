"""A ``with`` block that adds arguments to the call of every layer of a model.

The block is an entry of a context variable, so it applies to the thread or asyncio task that
entered it. A forward pre-hook of each layer adds the arguments if the block is the innermost block
of its kind; outside of blocks a layer has no hook and no overhead.

Activation checkpointing calls forward again in backward, often after the block and, on GPUs, in
another thread. Therefore the hooks of layers that were checkpointed in a block stay until the next
ordinary forward pass after it, and add the same arguments to the recomputation.
"""

from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from batchnorm.compat.modes import is_recomputing, may_be_recomputed
from batchnorm.compat.modules import is_compiled
from batchnorm.errors import BatchNormError, OptionError
from batchnorm.models.walk import walk
from batchnorm.nn.base import Layer

_open: ContextVar[tuple["Scope", ...]] = ContextVar("batchnorm_scopes", default=())

# Layer -> the blocks whose hooks it has, oldest first.
_hooked: WeakKeyDictionary[nn.Module, list["Scope"]] = WeakKeyDictionary()

POSITIONAL = ("input", "residual", "mask", "lengths", "weights", "groups")

NO_LAYERS = """\
{verb} passes {what} to batch normalizations of this library, and the model has {found}; call \
bn.convert(model) first, which bn.undo(model) reverts"""

COMPILED = """\
{verb} uses hooks of layers, which compiled code does not run, and {name} is compiled; use the \
model from before torch.compile, or pass {what} to the layers"""

UNUSED = """\
no batch normalization of the model was called inside of {verb}(...); the block has no effect in a \
model compiled by torch.compile, nor in threads started inside of it"""

SEVERAL = """\
activation checkpointing recomputes {name}, which was called in more than one {verb} block before \
this backward pass; call backward inside of each block"""


class Scope:
    """Base of the blocks.

    Attributes:
        verb: The public name, for messages.
        what: The added arguments, for messages.
        layers: Layer -> its name.
        pending: Layer -> number of checkpointed calls in the block that are not recomputed yet.
        token: Token of the context variable, while the block is open.
    """

    verb: str
    what: str

    def __init__(self, model: nn.Module) -> None:
        found = walk(model)
        self.layers = {one.layer: one.name for one in found if isinstance(one.layer, Layer)}
        words = {"verb": self.verb, "what": self.what}
        if not found or len(self.layers) < len(found):
            others = [f"{name} ({type(layer).__name__})" for name, _, layer in found
                      if layer not in self.layers]  # fmt: skip
            raise OptionError(NO_LAYERS.format(**words, found=", ".join(others[:3]) or "none"))
        for name, module in model.named_modules():
            if is_compiled(module):
                raise OptionError(COMPILED.format(**words, name=name or "the model"))
        self.model = model
        self._handles: dict[nn.Module, RemovableHandle] = {}
        self.pending: dict[nn.Module, int] = {}
        self._called = False
        self.token: Token[tuple[Scope, ...]] | None = None

    def arguments(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        """Return the arguments for a call of a layer."""
        raise NotImplementedError

    def again(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        """Return the arguments for the recomputation of a call of a layer."""
        return self.arguments(layer, x)

    def __enter__(self) -> "Scope":  # noqa: PYI034 (typing has Self from Python 3.11 on)
        if self.token is not None or self._handles:
            raise OptionError(f"expected a new {self.verb}(...) for each block")
        for layer in self.layers:
            hook = self._before
            self._handles[layer] = layer.register_forward_pre_hook(hook, with_kwargs=True)
            owners = _hooked.setdefault(layer, [])
            owners.append(self)
            for older in [one for one in owners if type(one) is type(self)][:-2]:
                if older.token is None:
                    older.drop(layer)
        self.token = _open.set((*_open.get(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        assert self.token is not None
        _open.reset(self.token)
        self.token = None
        for layer in [layer for layer in self._handles if layer not in self.pending]:
            self.drop(layer)
        if kind is None and not self._called:
            raise OptionError(UNUSED.format(verb=self.verb))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "token": None}

    def is_innermost(self, layer: nn.Module) -> bool:
        """Return whether this is the innermost block of its kind for a layer in this thread."""
        for scope in reversed(_open.get()):
            if type(scope) is type(self) and layer in scope.layers:
                return scope is self
        return False

    def drop(self, layer: nn.Module) -> None:
        """Remove the hook of a layer."""
        self._handles.pop(layer).remove()
        owners = _hooked.get(layer, [])
        if self in owners:
            owners.remove(self)

    def _before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        x = args[0] if args else kwargs.get("input")
        if not isinstance(x, Tensor) or not isinstance(layer, Layer):
            return None
        name = self.layers[layer] or "the model"
        if is_recomputing():
            owners = [one for one in _hooked.get(layer, [self]) if type(one) is type(self)]
            waiting = [one for one in owners if one.pending.get(layer)] or owners[-1:]
            if len(waiting) > 1:
                raise OptionError(SEVERAL.format(name=name, verb=self.verb))
            if self not in waiting or layer not in self.pending:
                return None
            self.pending[layer] = max(self.pending[layer] - 1, 0)
            found = self.again
        elif self.is_innermost(layer):
            self._called = True
            if layer.training and may_be_recomputed():
                self.pending[layer] = self.pending.get(layer, 0) + 1
            found = self.arguments
        else:
            inside = any(type(one) is type(self) and layer in one.layers for one in _open.get())
            if self.token is None and layer in self._handles and not inside:
                self.drop(layer)
            return None
        try:
            given = found(layer, x)
        except BatchNormError as wrong:
            wrong.args = (f"{wrong} [in layer {name!r}]",)
            raise
        said = {k: v for k, v in kwargs.items() if v is not None}
        said |= {k: v for k, v in zip(POSITIONAL, args, strict=False) if v is not None}
        if "mask" in given and not said.keys().isdisjoint(("mask", "lengths", "weights")):
            del given["mask"]
        return args, {**kwargs, **{k: v for k, v in given.items() if k not in said}}
