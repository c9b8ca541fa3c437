"""The arguments that an operator mutates, the order of operators, and ``TorchDispatchMode``.

Private names, and what happens without them:

- ``OpOverload._schema``: the names of an operator's arguments, and which of them it mutates.
  ``Tag`` has no tag for operators with ``out=``, and none that names the arguments. Without it
  in-place writes could not be distinguished from reads.
- ``torch.library._register_effectful_op``, ``torch._library.effects.EffectType``: keep the order of
  operations in graphs of AOTAutograd. No public form. Without it Inductor removes an operation on
  an empty batch and may reorder operations that do not depend on each other, so processes with
  batches of different sizes could call collectives in different orders.
- ``torch.utils._python_dispatch.TorchDispatchMode``: receives every operator that runs. No public
  form.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch._library.effects import EffectType
from torch.library import _register_effectful_op
from torch.utils._python_dispatch import TorchDispatchMode as DispatchMode

__all__ = ["DispatchMode", "named", "ordered", "written"]


def ordered(name: str, library: torch.library.Library) -> None:
    """Make compiled graphs keep the number and the order of the calls of an operation.

    Args:
        name: Name of the operation, with its namespace.
        library: The library that defined the operation.
    """
    _register_effectful_op(name, EffectType.ORDERED, lib=library)


def named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of an operator by name, including defaults.

    A higher-order operator has no schema: the names are then positions.
    """
    if not hasattr(func, "_schema"):
        return {str(i): value for i, value in enumerate(args)} | dict(kwargs)
    arguments = func._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    given = dict(zip((a.name for a in arguments), args, strict=False))
    return {**defaults, **given, **kwargs}


def written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the arguments to which a call of an operator writes: tensors, lists of them, or None.

    Args:
        func: An operator as passed to ``TorchDispatchMode``; higher-order operators have no schema
            and yield nothing.
        args: Positional arguments.
        kwargs: Keyword arguments.
    """
    arguments = func._schema.arguments if hasattr(func, "_schema") else ()
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | dict(kwargs)
    for argument in arguments:
        writes = argument.alias_info is not None and argument.alias_info.is_write
        # Batch normalization in training mutates these, but its schema does not declare it.
        statistics = argument.name in ("running_mean", "running_var") and given.get(
            "training", True
        )
        if writes or statistics:
            yield given.get(argument.name)
