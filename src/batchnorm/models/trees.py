"""The tensors in arguments and results of models, which may be nested."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn


def is_record(value: Any) -> bool:
    """Return whether a value is an instance of a dataclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested mappings, lists, tuples and dataclasses, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_record(value):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


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
        # Of a mapping or a list too: subclasses have attributes of their own.
        waiting += reversed(list(getattr(one, "__dict__", {}).values()))
    return found
