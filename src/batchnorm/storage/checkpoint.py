"""An open checkpoint: names and shapes are known, values are read one tensor at a time."""

import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.compat.tensors import storage_key
from batchnorm.errors import CheckpointError

# A vector of statistics has one value per channel. A longer tensor is not such a vector, and
# reading it would need much memory.
MOST_CHANNELS = 1 << 20
# Maximum number of repeated values in vectors (from strides of 0). Without this limit, a checkpoint
# of a few kilobytes could take minutes to read.
MOST_REPEATED = 1 << 26
# Maximum size of headers, indexes and pickles, which describe tensors but do not contain them.
MOST_DESCRIPTION = 32 << 20


@dataclass(frozen=True)
class Group:
    """The names of the tensors of one batch norm; None for tensors that do not exist.

    Attributes:
        layer: The layer's name in the checkpoint, including prefixes.
        mean: Name of the mean; the following attributes are names of the other tensors.
        eps: ε, if the format has it.
        training: Whether the layer also normalizes by the batch in evaluation, if the format has
            it.
        rows: Names of mean and variance per group of samples (``bn.Grouped``), (groups, C).
    """

    layer: str
    mean: str | None
    var: str | None
    weight: str | None = None
    bias: str | None = None
    counter: str | None = None
    eps: float | None = None
    training: bool | None = None
    rows: tuple[str, str] | None = None


class Vector(NamedTuple):
    """The values of a vector in float64 (real parts of complex values), and the stored dtype."""

    values: Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a file, a folder or a state dict, which are read on request.

    Attributes:
        subject: The path, or a description of a state dict; all messages begin with it.
        names: Names of all tensors.
        shape: Name -> shape of a tensor, without reading it; None if it is not a plain dense
            tensor.
        read: Name -> tensor on the CPU. Other modules should call ``vector`` only.
        nodes: The batch norms, for a graph format, which lists them; None for other formats.
        content: The state dict, or the object that contains it; None for files of tensors only.
    """

    subject: str
    names: tuple[str, ...]
    shape: Callable[[str], tuple[int, ...] | None]
    read: Callable[[str], Tensor]
    nodes: tuple[Group, ...] | None = None
    content: Any = None

    def length(self, name: str) -> int | None:
        """Return the number of values of a vector; None if the tensor is not a vector.

        Axes of size 1 are ignored: (1, C, 1, 1) is a vector of C values.
        """
        shape = self.shape(name)
        if shape is None:
            return None
        long = [size for size in shape if size != 1]
        if len(long) > 1:
            return None
        length = long[0] if long else 1
        return length if length <= MOST_CHANNELS else None

    def vector(self, name: str) -> Vector:
        """Return the values of a vector (``length`` is not None) with shape (C,).

        Raises:
            CheckpointError: If the file is too short, or the values cannot be decoded.
        """
        try:
            tensor = self.read(name).detach().reshape(-1)
            real = tensor.real if tensor.is_complex() else tensor
            return Vector(real.double(), tensor.dtype)
        except CheckpointError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
            raise CheckpointError(
                f"{self.subject}: the tensor {name!r} cannot be read ({first_line(error)}); the "
                "file is damaged, or has a dtype that torch cannot convert; write it again"
            ) from error


def of_state(state: Any, subject: str) -> Checkpoint:
    """Return the tensors of a state dict, also of one inside other mappings, lists and tuples.

    Raises:
        CheckpointError: If its vectors have far more values than their memory.
    """
    tensors = dict(_tensors(state))
    _check_repeats([tensor for tensor in tensors.values() if _is_plain(tensor)], subject)

    def shape(name: str) -> tuple[int, ...] | None:
        return tuple(tensors[name].shape) if _is_plain(tensors[name]) else None

    def read(name: str) -> Tensor:
        return tensors[name].cpu()

    return Checkpoint(subject, tuple(tensors), shape, read, content=state)


def _is_plain(tensor: Tensor) -> bool:
    dense = tensor.layout is torch.strided and not tensor.is_nested
    return dense and not tensor.is_quantized and not tensor.is_meta


def _check_repeats(tensors: Iterable[Tensor], subject: str) -> None:
    """Raise if vectors share or repeat so many values that reading them would take minutes."""
    vectors = [tensor for tensor in tensors if tensor.numel() <= MOST_CHANNELS]
    held = {storage_key(t): t.untyped_storage().nbytes() // t.element_size() for t in vectors}
    repeated = sum(tensor.numel() for tensor in vectors) - sum(held.values())
    if repeated > MOST_REPEATED:
        raise CheckpointError(
            f"{subject} was not read: its vectors have {repeated:,} values more than their memory, "
            "by shared storages or strides of 0; save contiguous tensors with separate storages"
        )


def _tensors(state: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors; each container is visited once, so cycles are allowed."""
    seen: set[int] = set()
    todo: list[tuple[str, Any]] = [("", state)]
    while todo:
        prefix, value = todo.pop()
        if isinstance(value, Tensor):
            yield prefix, value
            continue
        if not isinstance(value, Mapping | list | tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        inside = [
            (f"{prefix}.{key}" if prefix else str(key), item)
            for key, item in items
            if isinstance(item, Tensor | Mapping | list | tuple)
        ]
        todo.extend(reversed(inside))


def check_file(path: Path) -> int:
    """Return the size of a file in bytes.

    Raises:
        CheckpointError: If it is empty, or not a regular file (a pipe or device may never end).
        OSError: If it does not exist or cannot be accessed.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a regular file; expected a checkpoint on disk")
    if found.st_size == 0:
        raise CheckpointError(f"{path} is empty; copy or write the checkpoint again")
    return found.st_size


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message, at most 200 characters."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
