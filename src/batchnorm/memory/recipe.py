"""Recomputation of a normalization's output from its input, with the same bits."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.compat.tensors import base, version
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.call import Epilogue, RunningBuffers

# Output tensor -> how to recompute it. With weak keys an entry lives as long as the output, also if
# only autograd refers to it.
_RECIPES = WeakTensorKeyDictionary()

# Smaller outputs are saved as usual: recomputing would cost more than they do.
SMALLEST_BYTES = 1 << 16

CHANGED = """\
one of the variables needed for gradient computation has been modified by an inplace operation: \
[{kind} {shape}] is at version {now}; expected version {then} instead. (Found by bn.save_memory, \
which keeps the input of a batch normalization in the place of its output.)"""


class Kept:
    """A saved tensor, with the version that it must still have when it is needed."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the tensor may be the output of the node that saves it, which would be a cycle.
        self.tensor = tensor.detach()
        self.version = version(tensor)

    def value(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: With torch's message, if it was written to in place.
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
        version: The version of the output for which the recipe holds.
        pointer: The address of the output's memory at that time.
        handles: The number of saved references.
        served: The number of references that have been unpacked.
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
        """Return the tensors that this recipe holds, without those of recipes it depends on."""
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
        """Return the output for one saved reference; after the last one the cache is dropped."""
        y = self.value()
        self.served += 1
        if self.served >= self.handles:
            self.served, self.memo = 0, None
        return y


class Recipe(Recomputable):
    """act(normalize(x) + residual), where x and the residual are kept or have recipes too.

    Weight and bias are the copies in ``stats``, so later writes to the parameters do not matter. In
    residual networks recipes form chains, from each block back to the start of its stage.
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
        """Normalize as forward did."""
        residual = None if self.residual is None else self.residual.value()
        s = self.stats
        epilogue = Epilogue(s[4], s[5], residual, self.act)
        return self.backend.normalize(self.x.value(), s[0], s[2:4], epilogue, self.axis)

    def kept(self) -> list[Tensor]:
        """Return stats, and those of x and the residual that have no recipe."""
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
        """Return the positive part."""
        return self.parent.value().relu()

    def kept(self) -> list[Tensor]:
        """Return what the recipe of the operand holds."""
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
        """Do what the backend does."""
        y, stats = self.backend.forward(x, epilogue, eps, axis, running)
        if self._wants(y, x, epilogue):
            give(y, Recipe(self.backend, x, stats, epilogue, axis))
        return y, stats

    def normalize(
        self, x: Tensor, mean: Tensor, rstd: Tensor, epilogue: Epilogue, axis: int
    ) -> Tensor:
        """Do what the backend does."""
        y = self.backend.normalize(x, mean, rstd, epilogue, axis)
        if self._wants(y, x, epilogue):
            var = torch.zeros_like(mean)  # not read by make()
            affine = epilogue.weight, epilogue.bias
            stats = reference.known_stats(x, mean, var, reference.joined(rstd), *affine)
            give(y, Recipe(self.backend, x, stats, epilogue, axis))
        return y

    def _wants(self, y: Tensor, x: Tensor, epilogue: Epilogue) -> bool:
        # Without a gradient autograd does not save x, which a recipe would keep alive.
        given = (x, epilogue.weight, epilogue.bias)
        wanted = any(t is not None and t.requires_grad for t in given)
        return wanted and y.nbytes >= SMALLEST_BYTES and y is not epilogue.residual


def recipe_of(tensor: Tensor) -> Recomputable | None:
    """Return the recipe of a tensor or of its base, if the tensor was not changed since."""
    origin = base(tensor)
    made = tensor if origin is None else origin
    recipe: Recomputable | None = _RECIPES.get(made)
    if recipe is None or made.data_ptr() != recipe.pointer:  # y.data = z changes no version
        return None
    if tensor.dtype != made.dtype or tensor.is_conj() or tensor.is_neg():
        return None  # a view as another dtype, which size and stride do not describe
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
    """Whether the one write since was ``relu_``: only that leaves this grad_fn and one version."""
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "ReluBackward0"
