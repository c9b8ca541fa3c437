"""The map that is propagated through a network: scale times a tensor plus shift, elementwise.

A batch normalization in evaluation multiplies each channel by ``scale`` and adds ``shift``.
``Map.where`` is the channel index of every element of a tensor, for any arrangement of the
channels. It has size 1 along axes on which the map does not depend, so dependence on an axis is
decided by shapes, never by values.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from batchnorm.models.flow import Value

Shape = Sequence[int]

PART = "a part of the output of {name} is normalized, and the rest is not"
MIXED = "one element of the output of {name} is normalized in several ways"
REPEATED = "{name} is repeated along the axis of the normalized channels"


class Declined(Exception):  # noqa: N818 (not an error: the reason why a fold is not done)
    """A map cannot be propagated further; the argument is the reason."""


class Map(NamedTuple):
    """v -> scale * v + shift, element by element.

    Attributes:
        where: Index of the channel, int64; its shape broadcasts to that of the tensor.
        scale: One number per channel, float64.
        shift: One number per channel, float64.
    """

    where: Tensor
    scale: Tensor
    shift: Tensor

    @property
    def shifts(self) -> bool:
        """Whether any shift is not 0."""
        return bool(self.shift.any())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return scale and shift in the shape of ``where``."""
        return self.scale[self.where], self.shift[self.where]

    def at(self, where: Tensor) -> "Map":
        """Return the map with other indices."""
        return self._replace(where=compact(where))

    def without_shift(self) -> "Map":
        """Return the scale alone."""
        return self._replace(shift=torch.zeros_like(self.shift))

    def varies_along(self, rank: int) -> tuple[int, ...]:
        """Return the axes, of a tensor with ``rank`` axes, along which the map varies."""
        sizes = (1,) * (rank - self.where.ndim) + tuple(self.where.shape)
        return tuple(axis for axis, size in enumerate(sizes) if size > 1)


def per_channel(rank: int, axis: int, scale: Tensor, shift: Tensor) -> Map:
    """Return the map of a tensor with ``rank`` axes and channels on ``axis``."""
    where = torch.arange(len(scale)).view([-1 if i == axis % rank else 1 for i in range(rank)])
    return Map(where, scale, shift)


def compact(where: Tensor) -> Tensor:
    """Return the indices with size 1 along every axis along which they are constant."""
    for axis in range(where.ndim):
        first = where.narrow(axis, 0, 1)
        if where.shape[axis] > 1 and torch.equal(where, first.expand_as(where)):
            where = first
    return where


def reduced(found: Map, shape: Shape, name: str) -> Map:
    """Return the map of an operand that was broadcast to a tensor with the map ``found``.

    Raises:
        Declined: If the map varies along an axis along which the operand was repeated.
    """
    where = found.where
    while where.ndim > len(shape):
        if where.shape[0] > 1:
            raise Declined(REPEATED.format(name=name))
        where = where[0]
    where = where.reshape((1,) * (len(shape) - where.ndim) + tuple(where.shape))
    for axis, size in enumerate(shape):
        if size == 1 and where.shape[axis] > 1:
            raise Declined(REPEATED.format(name=name))
    return found._replace(where=where)


def before(found: Map, shape: Shape, moves: Callable[[Tensor], Tensor], name: str) -> Map:
    """Return the map of the input of a function that only moves elements.

    Args:
        found: The map of the output.
        shape: The shape of the input.
        moves: The function.
        name: Name of the input's producer, for the reason.

    Raises:
        Declined: If an element is not in the output, or at positions with different maps.
    """
    count = int(torch.Size(shape).numel())
    # Element indices as floats, since not every operator supports integers.
    source = moves(torch.arange(count, dtype=torch.float64).view(tuple(shape))).long()
    return found.at(_gathered(found.where, source, count, name).view(tuple(shape)))


def after(found: Map, shape: Shape, moves: Callable[[Tensor], Tensor]) -> Map:
    """Return the map of the output of a function that only moves elements."""
    return found.at(moves(found.where.expand(tuple(shape)).double()).long())


def through_view(found: Map, have: Value, want: Value, name: str) -> Map:
    """Return the map of a tensor from the map of another tensor in the same memory.

    Raises:
        Declined: If the map is known only in part, or is ambiguous for an element.
    """
    if _geometry(have) == _geometry(want):
        return found
    given, wanted = _offsets(have), _offsets(want)
    count = int(max(given.max(), wanted.max())) + 1
    table = _gathered(found.where, given, count, name, whole=False)[wanted]
    if bool((table < 0).any()):
        raise Declined(PART.format(name=name))
    return found.at(table)


def viewed(tensor: Tensor, have: Value, want: Value) -> Tensor:
    """Return the contents of a view, from another view of the same memory."""
    if _geometry(have) == _geometry(want):
        return tensor
    given, wanted = _offsets(have), _offsets(want)
    memory = tensor.new_zeros(int(max(given.max(), wanted.max())) + 1)
    memory[given.flatten()] = tensor.expand(have.shape).flatten()
    return memory[wanted]


def _gathered(
    where: Tensor, source: Tensor, count: int, name: str, *, whole: bool = True
) -> Tensor:
    """Return the channel index of each of ``count`` input elements, at positions ``source``."""
    table = torch.full((count,), -1)
    where, source = where.expand(source.shape).flatten(), source.flatten()
    table[source] = where
    if not torch.equal(table[source], where):
        raise Declined(MIXED.format(name=name))
    if whole and bool((table < 0).any()):
        raise Declined(PART.format(name=name))
    return table


def _geometry(value: Value) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    # The stride of an axis of size 1 is irrelevant.
    strides = tuple(s for s, n in zip(value.stride, value.shape, strict=True) if n > 1)
    return value.shape, strides, value.offset


def _offsets(value: Value) -> Tensor:
    """Return the memory offset of each element."""
    total = torch.tensor(value.offset)
    for size, stride in zip(value.shape, value.stride, strict=True):
        total = total.unsqueeze(-1) + torch.arange(size) * stride
    return total
