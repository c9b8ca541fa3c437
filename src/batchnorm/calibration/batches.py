"""Batches of any kind, as trees of tensors."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from batchnorm.models.trees import is_record, tensors_in


def moved(batch: Any, device: torch.device) -> Any:
    """Return the batch with its tensors on a device, whatever holds them."""
    return _mapped(batch, lambda tensor: tensor.to(device, non_blocking=True))


def size_of(batch: Any) -> int:
    """Return the number of samples: the length of the first tensor that has one, else 1."""
    if isinstance(batch, Tensor) and batch.ndim:
        return batch.shape[0]
    return next((len(tensor) for tensor in tensors_in(batch) if tensor.ndim), 1)


def bytes_of(batch: Any) -> int:
    """Return the memory of a batch's tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch))


def copied(batch: Any) -> Any:
    """Return the batch with copies of its tensors."""
    return _mapped(batch, lambda tensor: tensor.detach().clone())


def same(a: Any, b: Any) -> bool:
    """Return whether two batches are alike in structure, layout and every value; in doubt, no."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        looks = [(x.shape, x.dtype, x.device, x.layout) for x in (a, b)]
        if looks[0] != looks[1] or a.layout != torch.strided:
            return False
        return a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if is_record(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return isinstance(a, int | float | str | bytes | None) and bool(a == b)


def _mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        items = {name: _mapped(item, change) for name, item in batch.items()}
        return items if type(batch) is dict else _rebuilt(batch, items)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_mapped(item, change) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(_mapped(item, change) for item in batch)
    if is_record(batch):
        fields = {
            f.name: _mapped(getattr(batch, f.name), change)
            for f in dataclasses.fields(batch)
            if f.init
        }
        return dataclasses.replace(batch, **fields)
    return batch


def _rebuilt(batch: Any, items: dict[str, Any]) -> Any:
    try:
        return type(batch)(items)
    except TypeError:  # a mapping with a constructor of its own, as defaultdict
        return items


def cut(batch: Any, samples: int, wanted: int) -> Any:
    """Return the first ``wanted`` samples of a batch, or None where it cannot be cut."""
    sizes = {len(tensor) for tensor in tensors_in(batch) if tensor.ndim}
    if sizes != {samples}:
        return None
    return _mapped(batch, lambda tensor: tensor[:wanted] if tensor.ndim else tensor)
