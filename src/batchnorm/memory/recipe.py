"""How a normalization's result can be computed again, to the last bit, instead of being kept."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.compat.tensors import base, version
from batchnorm.ops.backends import reference
from batchnorm.ops.backends.base import Backend
from batchnorm.ops.call import Epilogue, Running

# Result -> its recipe, as long as the result lives, also where autograd alone refers to it.
_RECIPES = WeakTensorKeyDictionary()

# Smaller results are kept: the recipe would cost more than they do.
SMALLEST_BYTES = 1 << 16

CHANGED = """\
one of the variables needed for gradient computation has been modified by an inplace operation: \
[{kind} {shape}] is at version {now}; expected version {then} instead. (Found by bn.save_memory, \
which keeps the input of a batch normalization in the place of its output.)"""


class Kept:
    """A tensor that is kept as it is, and must not have been written to when it is needed."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached: the tensor may be the output of the very node that keeps it.
        self.tensor = tensor.detach()
        self.version = version(tensor)

    def value(self) -> Tensor:
        """Return the tensor.

        Raises:
            RuntimeError: Torch's own, if it has been changed in place.
        """
        now = version(self.tensor)
        if now != self.version:
            kind, shape = self.tensor.type(), list(self.tensor.shape)
            raise RuntimeError(CHANGED.format(kind=kind, shape=shape, now=now, then=self.version))
        return self.tensor


class Source:
    """A result that is made again when it is needed.

    What is made is remembered until everybody who waits for it has had it.

    Attributes:
        version: Of the result, when it was what this makes.
        pointer: To the result's memory at that time.
        handles: How many wait for the value.
        served: How many of them have had it.
    """

    __slots__ = ("handles", "memo", "pointer", "served", "version")

    def __init__(self, version: int) -> None:
        self.version = version
        self.pointer = 0
        self.handles = self.served = 0
        self.memo: Tensor | None = None

    def make(self) -> Tensor:
        """Compute the result."""
        raise NotImplementedError

    def kept(self) -> list[Tensor]:
        """Return what is kept because of this, without what other sources keep."""
        raise NotImplementedError

    def value(self) -> Tensor:
        """Return the result, computed now or before."""
        if self.memo is not None:
            return self.memo
        with torch.no_grad():
            y = self.make()
        if self.served < self.handles:
            self.memo = y
        return y

    def serve(self) -> Tensor:
        """Return the result to one of those who wait for it."""
        y = self.value()
        self.served += 1
        if self.served >= self.handles:
            self.served, self.memo = 0, None
        return y


class Recipe(Source):
    """act(normalize(x) + residual), of inputs that are kept or have recipes themselves.

    Weight and bias are those that forward used: its copies in stats, or copies made here.

    In residual networks recipes are chains: of every block, back to where the stage begins.
    """

    __slots__ = ("act", "axis", "backend", "residual", "stats", "x")

    def __init__(
        self, backend: Backend, x: Tensor, stats: Tensor, epilogue: Epilogue, axis: int
    ) -> None:
        super().__init__(0)
        self.backend, self.stats, self.act, self.axis = backend, stats, epilogue.act, axis
        self.x = source(x)
        self.residual = None if epilogue.residual is None else source(epilogue.residual)

    def make(self) -> Tensor:
        """Normalize as forward did."""
        residual = None if self.residual is None else self.residual.value()
        s = self.stats
        epilogue = Epilogue(s[4], s[5], residual, self.act)
        return self.backend.normalize(self.x.value(), s[0], s[2:4], epilogue, self.axis)

    def kept(self) -> list[Tensor]:
        """Return x and the residual as far as they are kept, and the small tensors."""
        parts = [self.x, *([] if self.residual is None else [self.residual])]
        tensors = [part.tensor for part in parts if isinstance(part, Kept)]
        return [*tensors, self.stats]


class Rectified(Source):
    """relu_ of a result, where the addition or the layer was not fused with it."""

    __slots__ = ("parent",)

    def __init__(self, parent: Source, version: int) -> None:
        super().__init__(version)
        self.parent = parent

    def make(self) -> Tensor:
        """Return the positive part."""
        return self.parent.value().relu()

    def kept(self) -> list[Tensor]:
        """Return what the result keeps."""
        return self.parent.kept()


class Recording:
    """A backend that gives every result its recipe."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def forward(
        self, x: Tensor, epilogue: Epilogue, eps: float, axis: int, running: Running | None = None
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
            var = torch.zeros_like(mean)  # which nothing reads
            affine = epilogue.weight, epilogue.bias
            stats = reference.known_stats(x, mean, var, reference.joined(rstd), *affine)
            give(y, Recipe(self.backend, x, stats, epilogue, axis))
        return y

    def _wants(self, y: Tensor, x: Tensor, epilogue: Epilogue) -> bool:
        # Without a gradient nothing keeps x, and a recipe would.
        given = (x, epilogue.weight, epilogue.bias)
        wanted = any(t is not None and t.requires_grad for t in given)
        return wanted and y.nbytes >= SMALLEST_BYTES and y is not epilogue.residual


def recipe_of(tensor: Tensor) -> Source | None:
    """Return the recipe of a tensor, or of what it is a view of, if it is as it was made."""
    origin = base(tensor)
    made = tensor if origin is None else origin
    recipe: Source | None = _RECIPES.get(made)
    if recipe is None or made.data_ptr() != recipe.pointer:  # y.data = z leaves no other trace
        return None
    if tensor.dtype != made.dtype or tensor.is_conj() or tensor.is_neg():
        return None  # seen as complex numbers; sizes and strides do not tell that
    if version(made) == recipe.version + 1 and _is_rectified(made):
        recipe = Rectified(recipe, version(made))
        give(made, recipe)
    return recipe if version(made) == recipe.version else None


def give(tensor: Tensor, recipe: Source) -> None:
    """Give a tensor its recipe."""
    recipe.version = version(tensor)
    recipe.pointer = tensor.data_ptr()
    _RECIPES[tensor] = recipe


def source(tensor: Tensor) -> Kept | Source:
    """Return how an input of a recipe comes back: by a recipe of its own, or because it is kept."""
    recipe = recipe_of(tensor) if base(tensor) is None else None
    return Kept(tensor) if recipe is None else recipe


def _is_rectified(tensor: Tensor) -> bool:
    """Whether the one change since was a relu_: nothing else leaves this node and one version."""
    return tensor.grad_fn is not None and tensor.grad_fn.name() == "ReluBackward0"
