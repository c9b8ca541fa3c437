"""Bitwise recomputation of a normalization's output from its input."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.compat.tensors import base, version
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.call import Epilogue, RunningBuffers

# Output tensor -> how to recompute it. With weak keys an entry exists as long as the output, even
# if only autograd refers to it.
_RECIPES = WeakTensorKeyDictionary()

# Smaller outputs are saved as usual: recomputation would cost more than it saves.
SMALLEST_BYTES = 1 << 16

CHANGED = """\
one of the variables needed for gradient computation has been modified by an inplace operation: \
[{kind} {shape}] is at version {now}; expected version {then} instead. (Found by bn.save_memory, \
which keeps the input of a batch normalization instead of its output.)"""


class Kept:
    """A saved tensor, with the version that it must have when it is used."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, to avoid a reference cycle: the tensor may be an output of the node that saves
        # it.
        self.tensor = tensor.detach()
        self.version = version(tensor)

    def value(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: If it was modified in place; with torch's message.
        """
        now = version(self.tensor)
        if now != self.version:
            kind, shape = self.tensor.type(), list(self.tensor.shape)
            raise RuntimeError(CHANGED.format(kind=kind, shape=shape, now=now, then=self.version))
        return self.tensor


class Recomputable:
    """How to recompute an output.

    The recomputed tensor is cached until all saved references to it have been unpacked.

    Attributes:
        version: The version of the output for which the recipe is valid.
        pointer: The address of the output's memory at that time.
        handles: Number of saved references.
        served: Number of references that have been unpacked.
    """

    __slots__ = ("handles", "memo", "pointer", "served", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.pointer = 0
        self.handles = self.served = 0
        self.memo: Tensor | None = None

    def make(self) -> Tensor:
        """Compute the output."""
        raise NotImplementedError

    def kept(self) -> list[Tensor]:
        """Return the tensors that this recipe keeps, without those of recipes it depends on."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """Return the output, cached or computed."""
        if self.memo is not None:
            return self.memo
        with torch.no_grad():
            y = self.make()
        if self.served < self.handles:
            self.memo = y
        return y

    def serve(self) -> Tensor:
        """Return the output for one saved reference; the last reference releases the cache."""
        y = self.value()
        self.served += 1
        if self.served >= self.handles:
            self.served, self.memo = 0, None
        return y


class Recipe(Recomputable):
    """act(normalize(x) + residual), where x and the residual are kept or have recipes themselves.

    Weight and bias are the copies in ``stats``, so later changes of the parameters have no effect.
    In residual networks recipes form chains, from each block back to the start of its stage.
    """

    __slots__ = ("act", "axis", "backend", "residual", "stats", "x")

    def __init__(
        self, backend: Backend, x: Tensor, stats: Tensor, epilogue: Epilogue, axis: int
    ) -> None:
        super().__init__(0)
        self.backend, self.stats, self.act, self.axis = backend, stats, epilogue.act, axis
        self.x = origin_of(x)
        self.residual = None if epilogue.residual is None else origin_of(epilogue.residual)

    def make(self) -> Tensor:
        """Normalize in the same way as forward."""
        residual = None if self.residual is None else self.residual.value()
        s = self.stats
        epilogue = Epilogue(s[4], s[5], residual, self.act)
        return self.backend.normalize(self.x.value(), s[0], s[2:4], epilogue, self.axis)

    def kept(self) -> list[Tensor]:
        """Return stats, and x and the residual unless they have recipes."""
        parts = [self.x, *([] if self.residual is None else [self.residual])]
        tensors = [part.tensor for part in parts if isinstance(part, Kept)]
        return [*tensors, self.stats]


class Rectified(Recomputable):
    """``relu_`` of an output with a recipe, as a separate operation."""

    __slots__ = ("parent",)

    def __init__(self, parent: Recomputable, version: int) -> None:
        super().__init__(version)
        self.parent = parent

    def make(self) -> Tensor:
        """Return relu of the operand."""
        return self.parent.value().relu()

    def kept(self) -> list[Tensor]:
        """Return the tensors that the recipe of the operand keeps."""
        return self.parent.kept()


class RecordingBackend:
    """Wraps a backend: registers a recipe for the output of ``forward`` and ``normalize``."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(
        self,
        x: Tensor,
        epilogue: Epilogue,
        eps: float,
        axis: int,
        running: RunningBuffers | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Call the backend, and register a recipe for its output."""
        y, stats = self.backend.forward(x, epilogue, eps, axis, running)
        if self._wants(y, x, epilogue):
            give(y, Recipe(self.backend, x, stats, epilogue, axis))
        return y, stats

    def normalize(
        self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int
    ) -> Tensor:
        """Call the backend, and register a recipe for its output."""
        y = self.backend.normalize(x, mean, rstd, epilogue, axis)
        if self._wants(y, x, epilogue):
            var = torch.zeros_like(mean)  # not read by make()
            affine = epilogue.weight, epilogue.bias
            stats = reference.known_stats(x, mean, var, reference.joined(rstd), *affine)
            give(y, Recipe(self.backend, x, stats, epilogue, axis))
        return y

    def _wants(self, y: Tensor, x: Tensor, epilogue: Epilogue) -> bool:
        # If no gradient is needed, autograd does not save x, and a recipe would keep it alive.
        given = (x, epilogue.weight, epilogue.bias)
        wanted = any(t is not None and t.requires_grad for t in given)
        return wanted and y.nbytes >= SMALLEST_BYTES and y is not epilogue.residual


def recipe_of(tensor: Tensor) -> Recomputable | None:
    """Return the recipe of a tensor or of its base, if the tensor has not been modified since."""
    origin = base(tensor)
    made = tensor if origin is None else origin
    recipe: Recomputable | None = _RECIPES.get(made)
    if recipe is None or made.data_ptr() != recipe.pointer:  # y.data = z keeps the version
        return None
    if tensor.dtype != made.dtype or tensor.is_conj() or tensor.is_neg():
        return None  # a view with another dtype, which as_strided cannot create
    if version(made) == recipe.version + 1 and _is_rectified(made):
        recipe = Rectified(recipe, version(made))
        give(made, recipe)
    return recipe if version(made) == recipe.version else None


def give(tensor: Tensor, recipe: Recomputable) -> None:
    """Register the recipe of a tensor."""
    recipe.version = version(tensor)
    recipe.pointer = tensor.data_ptr()
    _RECIPES[tensor] = recipe


def origin_of(tensor: Tensor) -> Kept | Recomputable:
    """Return an input of a recipe: its own recipe if it has one, else the kept tensor."""
    recipe = recipe_of(tensor) if base(tensor) is None else None
    return Kept(tensor) if recipe is None else recipe


def _is_rectified(tensor: Tensor) -> bool:
    """Return whether the only write since was ``relu_``, by the grad_fn and the version."""
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "ReluBackward0"
