"""The tensors in nested arguments and results of models."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def parts(value: Any) -> list[Any] | None:
    """Return the items of a mapping, list, tuple or dataclass; None for any other value."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, list | tuple):
        return list(value)
    if is_record(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists, tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for part in parts(value) or ():
            yield from tensors_in(part)


def has_others(value: Any) -> bool:
    """Return whether a value has anything besides tensors, None, and containers of them."""
    if value is None or isinstance(value, Tensor):
        return False
    inner = parts(value)
    return inner is None or any(map(has_others, inner))


def replaced(value: Any, new: Callable[[Tensor], Any]) -> Any:
    """Return nested mappings, lists and tuples with each tensor replaced by ``new(tensor)``."""
    if isinstance(value, Tensor):
        return new(value)
    if isinstance(value, Mapping):
        return {key: replaced(item, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(item, new) for item in value]
    return value


def tensors_within(value: Any) -> list[Tensor]:
    """Return the tensors in a value of any type: also in sets and in attributes of objects.

    Modules, classes and functions are not entered.
    """
    found: list[Tensor] = []
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, nn.Module | type) or callable(one):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            found.append(one)
            continue
        if isinstance(one, Mapping):
            waiting += reversed(list(one.values()))
        elif isinstance(one, list | tuple | set | frozenset):
            waiting += reversed(list(one))
        # Also for mappings and lists: their subclasses may have attributes.
        waiting += reversed(list(getattr(one, "__dict__", {}).values()))
    return found


def bytes_of(value: Any) -> int:
    """Return the memory of the tensors in a value."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(value))


def mapped(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the value with each of its tensors replaced by ``change(tensor)``."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        items = {name: mapped(item, change) for name, item in value.items()}
        return items if type(value) is dict else _rebuilt(value, items)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(item, change) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, change) for item in value)
    if is_record(value):
        fields = {
            f.name: mapped(getattr(value, f.name), change)
            for f in dataclasses.fields(value)
            if f.init
        }
        return dataclasses.replace(value, **fields)
    return value


def _rebuilt(value: Any, items: dict[str, Any]) -> Any:
    try:
        return type(value)(items)
    except TypeError:  # a mapping with another constructor, such as defaultdict
        return items


def same(a: Any, b: Any) -> bool:
    """Return whether two values have equal structure, layout and values; False if unknown."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        looks = [(x.shape, x.dtype, x.device, x.layout) for x in (a, b)]
        if looks[0] != looks[1] or a.layout != torch.strided:
            return False
        return a.stride() == b.stride() and torch.equal(a, b)
    if isinstance(a, Mapping) and list(a) != list(b):
        return False
    inner, others = parts(a), parts(b)
    if inner is not None and others is not None:
        return len(inner) == len(others) and all(map(same, inner, others))
    return isinstance(a, int | float | str | bytes | None) and bool(a == b)
